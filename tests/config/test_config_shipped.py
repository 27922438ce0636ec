"""Every YAML file that we ship composes, fits its schema and passes the checks."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import vapo_async.config
from vapo_async.config import (
    GROUPS,
    AdvantageKind,
    AnswerStyle,
    ChainSumTaskConfig,
    Config,
    DatasetTaskConfig,
    EmbeddedModelConfig,
    ImportanceKind,
    InlineLauncherConfig,
    KVCacheOnUpdate,
    RayLauncherConfig,
    SmolLM2ModelConfig,
    TorchLearnerConfig,
    TransformersEngineConfig,
    resolved_lead,
)
from vapo_async.config_help import field_docs
from vapo_async.config_load import (
    default_config_dir,
    flatten,
    group_choices,
    help_text,
    load_config,
    read_config,
    save_config,
)

FILES = sorted(path.relative_to(default_config_dir()) for path in default_config_dir().rglob("*.yaml"))
SCHEMAS = [Config, *(s for s in vars(vapo_async.config).values() if is_dataclass(s) and s is not Config)]
NEEDS = {"model=folder": ["model.path=somewhere"]}  # what a choice leaves to the user


def test_config_dir_holds_what_the_readme_promises() -> None:
    assert {str(f) for f in FILES} >= {"config.yaml", "algorithm/vapo.yaml", "task/gsm8k.yaml", "launcher/ray.yaml"}
    assert {f.parts[0] for f in FILES if len(f.parts) == 2} == {*GROUPS, "experiment"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_config_file_parses_and_passes_the_checks(file: Path) -> None:
    overrides = [] if len(file.parts) == 1 else [f"{file.parts[0]}={file.stem}"]
    config = load_config(overrides + [o for choice in overrides for o in NEEDS.get(choice, [])])
    for group, schemas in GROUPS.items():
        assert type(getattr(config, group)) in schemas.values()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_config_file_begins_with_a_comment_for_the_help(file: Path) -> None:
    lines = (default_config_dir() / file).read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# ") and len(first) > 20


def test_config_default_run_has_the_right_types() -> None:
    config = load_config([])
    assert type(config.task) is ChainSumTaskConfig
    assert type(config.model) is EmbeddedModelConfig
    assert type(config.engine) is TransformersEngineConfig
    assert type(config.learner) is TorchLearnerConfig
    assert type(config.launcher) is RayLauncherConfig
    assert config.algorithm.advantage is AdvantageKind.gae
    assert config.algorithm.importance is ImportanceKind.decoupled
    assert config.task.answer_style is AnswerStyle.hash
    assert config.engine.kv_cache_on_update is KVCacheOnUpdate.recompute
    assert config.buffer.max_staleness >= 2 and resolved_lead(config.buffer) > 0
    assert config.evaluation.problems >= 256 and config.evaluation.samples == 4


def test_config_vapo_is_the_papers() -> None:
    a = load_config(["algorithm=vapo"]).algorithm
    assert (a.alpha, a.groups_per_batch, a.group_size, a.minibatches) == (0.05, 512, 16, 16)
    assert (a.policy_lr, a.critic_lr, a.value_pretraining_steps) == (1e-6, 2e-6, 50)
    assert (a.clip_low, a.clip_high, a.nll_coef, a.lmbda_critic, a.length_adaptive) == (0.2, 0.28, 0.1, 1.0, True)


def test_config_experiment_is_laid_over_the_groups_and_under_the_command_line() -> None:
    config = load_config(["experiment=smollm2_gsm8k", "steps=2", "algorithm.group_size=8"])
    assert isinstance(config.task, DatasetTaskConfig) and isinstance(config.model, SmolLM2ModelConfig)
    assert config.task.answer_separator == "####" and config.task.max_response_tokens == 96
    assert (config.steps, config.algorithm.groups_per_batch, config.algorithm.group_size) == (2, 4, 8)
    assert config.algorithm.alpha == 0.05
    overridden = load_config(["experiment=smollm2_gsm8k", "launcher=inline", "model=embedded"])
    assert isinstance(overridden.launcher, InlineLauncherConfig) and isinstance(overridden.model, EmbeddedModelConfig)


def test_config_later_overrides_win_and_null_is_none() -> None:
    config = load_config(["steps=3", "steps=7", "algorithm.behaviour_weight_cap=null", "experiment=null"])
    assert config.steps == 7 and config.algorithm.behaviour_weight_cap is None


def test_config_text_with_signs_is_taken_when_quoted() -> None:
    assert load_config(['task.template="Solve: {question} = ?"']).task.template == "Solve: {question} = ?"


@pytest.mark.parametrize("overrides", [[], ["experiment=smollm2_gsm8k"], ["launcher=inline", "task=math"]])
def test_config_saved_file_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(overrides)
    save_config(config, tmp_path / "config.yaml", overrides)
    assert read_config(tmp_path / "config.yaml") == config
    for override in overrides:
        assert override in (tmp_path / "config.yaml").read_text()


def test_config_flatten_names_every_field_once() -> None:
    flat = flatten(load_config([]))
    assert flat["algorithm.alpha"] == 1.5 and flat["algorithm.importance"] == "decoupled" and flat["seed"] == 0


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_config_every_field_is_explained(schema: type[Any]) -> None:
    assert [name for name, doc in field_docs(schema).items() if not doc] == []
    assert schema.__doc__ and not schema.__doc__.startswith(f"{schema.__name__}("), "dataclass writes one otherwise"


def test_config_help_names_every_group_choice_and_field() -> None:
    text = help_text()
    for group, choices in group_choices().items():
        assert f"  {group}=\n" in text
        for choice in choices:
            assert f" {choice} " in text
    for overrides in ([], ["task=gsm8k", "launcher=inline"], ["model=smollm2"], ["model=folder", "model.path=x"]):
        for key in flatten(load_config(overrides)):
            assert f"  {key} = " in text
    assert "algorithm.alpha = 1.5" in text  # the default run's value, not the schema's
    assert "model.path = (required)" in text
    assert "S: no group older than this" in text
    assert max(len(line) for line in text.splitlines()) <= 125
