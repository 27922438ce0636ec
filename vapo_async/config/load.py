"""From the command line to a checked :class:`~vapo_async.config.Config`: Hydra composes, mistakes become one line.

The group choices of the command line are composed by Hydra first; the values are then laid over the typed result one
by one, so that every mistake is told with the override that made it.
"""

import difflib
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vapo_async.config.algorithm import without_groups
from vapo_async.config.checks import check_config
from vapo_async.config.errors import ConfigError
from vapo_async.config.help import describe_type, every_key, field_docs, field_types, help_page
from vapo_async.config.tree import GROUPS, OVERLAYS, Config
from vapo_async.config.unread import unread


def default_config_dir() -> Path:
    """``vapo_async/configs`` of an installed wheel, else the checkout's ``configs/`` beside the package."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """Composes, types and checks a run's configuration; raises :class:`ConfigError` (one line) for any mistake.

    Args:
        overrides: ``group=choice`` and ``section.key=value``, as on the command line; later ones win.
        config_dir: the folder that holds ``config.yaml`` and the groups; None = the shipped one.
    """
    folder = (default_config_dir() if config_dir is None else config_dir).resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"no config.yaml in the configuration folder {folder}")
    choices = group_choices(folder)
    parsed = [_parse(text) for text in overrides]
    chosen = [choice for o in parsed if o.key_or_group in choices for choice in _check_choice(o, choices)]
    cfg = _compose(folder, chosen)
    for override in parsed:
        if override.key_or_group not in choices:
            _apply(cfg, override, folder)
    config = _to_config(cfg)
    for choice in chosen:
        if choice.startswith("ablation="):
            _check_ablation(
                config, choice, _compose(folder, chosen), _compose(folder, [c for c in chosen if c != choice])
            )
    return config


def group_choices(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Group → its choices: the YAML files found on disk."""
    folder = default_config_dir() if config_dir is None else config_dir
    return {group: sorted(p.stem for p in (folder / group).glob("*.yaml")) for group in (*GROUPS, *OVERLAYS)}


def help_text(config_dir: Path | None = None) -> str:
    """The page that ``--help`` prints: usage, groups with their choices, every field."""
    folder = default_config_dir() if config_dir is None else config_dir
    return help_page(folder, load_config([], folder))


def save_config(config: Config, path: Path, overrides: Sequence[str] = ()) -> None:
    """Writes the resolved configuration as YAML that :func:`read_config` reads back.

    ``schemas`` says which dataclass each group was filled into; ``overrides`` are kept as a comment.
    """
    schemas = {group: _schema_name(group, getattr(config, group)) for group in GROUPS}
    body = OmegaConf.to_yaml(OmegaConf.create({"schemas": schemas, **to_dict(config)}))
    command = f"# overrides: {' '.join(overrides) or '(none)'}\n"
    draft = path.with_name(f".{path.name}.partial")  # a kill or a full disk leaves the old one whole
    draft.write_text("# The resolved configuration of this run.\n" + command + body, encoding="utf-8")
    draft.replace(path)


def read_config(path: Path) -> Config:
    """The configuration that :func:`save_config` wrote, typed and checked again."""
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig) or "schemas" not in loaded:
            raise ConfigError(f"{path} is not a configuration that a run has saved: it has no 'schemas'")
        schemas = loaded.pop("schemas")
        cfg = OmegaConf.structured(Config)
        for group, known in GROUPS.items():
            if schemas.get(group) not in known:
                raise ConfigError(f"{path}: schemas.{group} is {schemas.get(group)!r}, expected one of {_names(known)}")
            cfg[group] = OmegaConf.structured(known[schemas[group]])
        cfg = OmegaConf.merge(cfg, loaded)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    assert isinstance(cfg, DictConfig)
    return _to_config(cfg)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data: enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flatten(config: Config) -> dict[str, Any]:
    """``{"algorithm.alpha": 1.5, …}``: every field by its dotted key."""
    return dict(_leaves("", to_dict(config)))


def nearest(word: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the name that the user may have meant, or an empty string."""
    names = list(names)
    same_end = [n for n in names if n.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    close = same_end or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not close:  # a right section before a wrong field, or a field without its section
        ends = {n.rsplit(".", 1)[-1]: n for n in names}
        close = [ends[e] for e in difflib.get_close_matches(word.rsplit(".", 1)[-1], ends, n=1, cutoff=0.6)]
    return f"; did you mean '{close[0]}'?" if close else ""


def _register_schemas() -> None:
    store = ConfigStore.instance()
    store.store(name="config_schema", node=Config)
    for group, schemas in GROUPS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"{name}_schema", node=schema)


def _parse(text: str) -> Override:
    if text.startswith("-"):
        raise ConfigError(f"unknown option '{text}'; settings are written key=value (--help lists them)")
    if text.startswith(("+", "~")):
        raise ConfigError(
            f"malformed override '{text}': every setting exists already, write key=value without '{text[0]}'"
        )
    if "=" not in text or text.startswith("="):
        raise ConfigError(f"malformed override '{text}': write key=value or group=choice (--help lists them)")
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, OmegaConfBaseException) as error:
        key, _, value = text.partition("=")
        raise ConfigError(
            f"malformed override '{text}': cannot read the value; quote text that holds signs: '{key}=\"{value}\"'"
        ) from error
    if override.package is not None:
        raise ConfigError(f"malformed override '{text}': write key=value or group=choice without '@'")
    if override.is_sweep_override():
        raise ConfigError(f"malformed override '{text}': one run takes one value; a list is written [a,b]")
    return override


def _check_choice(override: Override, choices: dict[str, list[str]]) -> list[str]:
    group = override.key_or_group
    value = override.value()
    known = choices[group]
    if value is None and group in OVERLAYS:
        return []
    if not isinstance(value, str) or value not in known:
        raise ConfigError(
            f"unknown choice '{group}={override.get_value_string()}'; choices: {', '.join(known) or 'none'}"
            f"{nearest(str(value), known)}"
        )
    return [f"{group}={value}"]


def _check_ablation(config: Config, choice: str, with_it: DictConfig, without: DictConfig) -> None:
    """An ablation that takes nothing away would be a false result."""
    before, after = (dict(_leaves("", OmegaConf.to_container(cfg))) for cfg in (without, with_it))
    changed = [key for key in after if after[key] != before[key]]
    if not changed:
        raise ConfigError(f"{choice} changes nothing here: the technique is off already")
    reasons = unread(config)
    if all(key in reasons for key in changed):
        raise ConfigError(f"{choice} changes nothing here: {changed[0]} has no effect with {reasons[changed[0]]}")


def _compose(folder: Path, chosen: list[str]) -> DictConfig:
    _register_schemas()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            cfg = compose("config", overrides=chosen)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_told_by_hydra(folder, chosen, error)) from error
    OmegaConf.set_struct(cfg, True)
    return cfg


def _apply(cfg: DictConfig, override: Override, folder: Path) -> None:
    key, value = override.key_or_group, override.value()
    types = field_types(cfg)
    inside = [k for k in types if k.startswith(f"{key}.")]
    if inside:
        raise ConfigError(f"'{key}' is a section: set its fields, for example {inside[0]}=…")
    if key not in types:
        raise ConfigError(f"unknown key '{key}'{_elsewhere(folder, key) or nearest(key, types)}")
    try:
        names = isinstance(value, dict)  # of a mapping's own, which the schema does not know
        OmegaConf.update(cfg, key, value, merge=not names, force_add=names)
    except (OmegaConfBaseException, ValueError) as error:
        expected = types[key]
        is_enum = isinstance(expected, type) and issubclass(expected, Enum)
        hint = nearest(str(value), [member.name for member in expected]) if is_enum else ""
        found = override.get_value_string()
        raise ConfigError(f"{key} must be {describe_type(expected)}, found '{found}'{hint}") from error


def _elsewhere(folder: Path, key: str) -> str:
    """Says so when the key belongs to other choices of its group."""
    group, _, name = key.partition(".")
    schemas = [f"- {schema}_schema" for schema, kind in GROUPS.get(group, {}).items() if name in field_docs(kind)]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / group).glob("*.yaml"))}
    owners = [f"{group}={choice}" for choice, text in texts.items() if any(schema in text for schema in schemas)]
    return f" for this {group}: it belongs to {', '.join(owners)}" if schemas and owners else ""


def _to_config(cfg: DictConfig) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            section, _, name = missing[0].rpartition(".")
            doc = field_docs(OmegaConf.get_type(cfg, section or None) or Config).get(name, "")
            raise ConfigError(f"{missing[0]} is required: give {missing[0]}=…" + (f" ({doc})" if doc else ""))
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    assert isinstance(config, Config)
    check_config(config)
    without_groups(config.algorithm)
    return config


def _schema_name(group: str, section: Any) -> str:
    kind = section if isinstance(section, type) else type(section)
    return next(name for name, schema in GROUPS[group].items() if schema is kind)


def _leaves(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{prefix}.{name}" if prefix else name, inner)


def _told_by_hydra(folder: Path, chosen: Sequence[str], error: Exception) -> str:
    """Hydra's several lines about a YAML file as one: where, which key, what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) < 2 or "raised while composing" not in lines[0]:
        return f"{folder}: {lines[0] if lines else type(error).__name__}"
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    known = every_key()
    choice = next((c for c in reversed(chosen) if c.startswith(f"{key.partition('.')[0]}=")), None)
    if choice is not None and key in known and lines[1].startswith("Key ") and " not in " in lines[1]:
        file, group = lines[0].split("'")[1], choice.partition("=")[0]
        return (
            f"{file.replace('/', '=', 1)} sets {key}, which {choice} has not: leave {group}= out, "
            f"or copy {folder / file}.yaml and change that"
        )
    hint = nearest(key, known) if key not in known else ""
    return f"{folder}: {lines[0].split(':')[0]}: {key}: {lines[1]}{hint}"


def _names(mapping: Iterable[str]) -> str:
    return ", ".join(mapping)


def _first_line(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{key}: {line}" if key and key not in line else line
