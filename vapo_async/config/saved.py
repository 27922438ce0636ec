"""A run's own ``config.yaml`` as the starting point: for going on with the run, and for evaluating it."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from vapo_async.config.errors import ConfigError
from vapo_async.config.load import default_config_dir, flatten, load_config, read_config, save_config
from vapo_async.config.tree import GROUPS, OVERLAYS, Config

CONFIG_FILE = "config.yaml"
"""In a run's folder."""
_SAVED = "saved"  # the choice of every group that a run's own configuration becomes
_NOT_THE_RUNS = ("resume", "runs_dir", "name")  # say where a run is, not what it is


def lay_over(config: Config, overrides: Sequence[str]) -> Config:
    """``overrides`` over a run's configuration, which becomes the default choice of every group."""
    with tempfile.TemporaryDirectory(prefix="vapo-async-config-") as scratch:
        folder = Path(scratch) / "configs"
        shutil.copytree(default_config_dir(), folder)
        root = folder / "config.yaml"
        save_config(config, root)
        values = yaml.safe_load(root.read_text(encoding="utf-8"))
        schemas = values.pop("schemas")
        for group in GROUPS:
            section = {"defaults": [f"{schemas[group]}_schema", "_self_"], **values.pop(group)}
            (folder / group / f"{_SAVED}.yaml").write_text(yaml.safe_dump(section), encoding="utf-8")
        groups = [{group: _SAVED} for group in GROUPS]
        values["defaults"] = ["config_schema", *groups, "_self_", *({overlay: None} for overlay in OVERLAYS)]
        root.write_text(yaml.safe_dump(values), encoding="utf-8")
        return load_config(overrides, folder)


def resumed_config(run_dir: Path, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The run's configuration with ``overrides`` over it, and what they change, one line each."""
    saved = read_config(run_dir / CONFIG_FILE)
    config = lay_over(saved, overrides)
    before, after = flatten(saved), flatten(config)
    for key in ("task.max_prompt_tokens", "task.max_response_tokens"):
        if after[key] < before[key]:
            raise ConfigError(
                f"{key} must be ≥ {before[key]}, found {after[key]}: a run that goes on has prompts and unfinished "
                "responses of that length; start a new run to lower it"
            )
    changed = [
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in _NOT_THE_RUNS
    ]
    return config, changed
