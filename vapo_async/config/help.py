"""What ``--help`` says: usage, groups with their choices, and every field with its docstring, type and default."""

import ast
import dataclasses
import inspect
import textwrap
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from vapo_async.config.tree import GROUPS, OVERLAYS, Config

USAGE = """\
usage: python scripts/train_async.py [group=choice …] [section.key=value …]

Trains a language model by asynchronous VAPO. Groups choose the parts, values set their fields; later words win.
  python scripts/train_async.py                                          the default run, on this machine
  python scripts/train_async.py buffer.max_staleness=4 algorithm.alpha=0.5
  python scripts/train_async.py experiment=quick
  python scripts/train_async.py resume=auto                              goes on from the newest checkpoint
Text that holds spaces or signs wants two pairs of quotes: 'task.template="Solve: {question}"'.
"""


def help_page(config_dir: Path, default: Config) -> str:
    """The whole page.

    Args:
        config_dir: where the choices are read from.
        default: the run without overrides: its values are shown where a section is part of it.
    """
    parts = [USAGE, "GROUPS (group=choice; * marks the default)"]
    defaults = _default_choices(config_dir)
    for group in (*GROUPS, *OVERLAYS):
        parts.append(f"  {group}=")
        for path in sorted((config_dir / group).glob("*.yaml")):
            mark = "*" if defaults.get(group) == path.stem else " "
            parts.append(_wrapped(f"   {mark} {path.stem:<16}", _first_comment(path)))
    parts.append("\nSETTINGS (key = value in the default run, or the schema's where a section is not part of it)")
    sections: list[tuple[str, str, type[Any]]] = [("", "the run", Config)]
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            sections += [(field.name, _title(field.name, name), schema) for name, schema in GROUPS[field.name].items()]
        elif dataclasses.is_dataclass(hint := get_type_hints(Config)[field.name]) and isinstance(hint, type):
            sections.append((field.name, field.name, hint))
    for prefix, title, schema in sections:
        section = getattr(default, prefix) if prefix else default
        parts.append(f"\n[{title}] {_class_doc(schema)}".rstrip())
        parts += _field_lines(prefix, schema, vars(section) if type(section) is schema else {})
    return "\n".join(parts) + "\n"


def field_docs(schema: type[Any]) -> dict[str, str]:
    """Field → the string literal under it (inherited ones first), or the docstring of its enum or dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        last = ""
        for statement in body.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                last = statement.target.id
                docs.setdefault(last, "")
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
                docs[last] = " ".join(str(statement.value.value).split())
    hints = get_type_hints(schema)
    for name, doc in docs.items():
        if not doc and isinstance(hints[name], type) and hints[name].__module__.startswith("vapo_async."):
            docs[name] = (hints[name].__doc__ or "").strip().splitlines()[0]
    return docs


def field_types(cfg: DictConfig) -> dict[str, Any]:
    """Dotted key → declared type, for every field of a composed configuration (sections themselves left out)."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            section = OmegaConf.get_type(cfg, name)
            types |= {f"{name}.{inner}": inner_hint for inner, inner_hint in get_type_hints(section).items()}
        else:
            types[name] = hint
    return types


def every_key() -> list[str]:
    """Dotted keys of every field of every schema, whatever is chosen."""
    keys: list[str] = []
    for name, hint in get_type_hints(Config).items():
        schemas: list[Any] = list(GROUPS.get(name, {}).values())
        if not schemas and dataclasses.is_dataclass(hint):
            schemas.append(hint)
        keys += [f"{name}.{inner.name}" for schema in schemas for inner in dataclasses.fields(schema)] or [name]
    return keys


def describe_type(hint: Any) -> str:
    """A type in a user's words: ``a number or null``, ``one of token, sequence``."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join("null" if arg is NoneType else describe_type(arg) for arg in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    if hint == dict[str, float]:
        return "names with amounts, as in {name: 1}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(hint, str(hint))


def _title(group: str, name: str) -> str:
    return group if len(GROUPS[group]) == 1 else f"{group}: {name}"


def _field_lines(prefix: str, schema: type[Any], values: dict[str, Any]) -> list[str]:
    hints, docs, lines = get_type_hints(schema), field_docs(schema), []
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            continue
        key = f"{prefix}.{field.name}" if prefix else field.name
        plain = hints[field.name] if isinstance(hints[field.name], type) else None
        choices = f" [{describe_type(plain)}]" if plain is not None and issubclass(plain, Enum) else ""
        lines.append(_wrapped(f"  {key} = {_shown(values.get(field.name, field.default))}", docs[field.name] + choices))
    return lines


def _class_doc(schema: type[Any]) -> str:
    """Its docstring; dataclasses without one get a signature, which says nothing."""
    doc = inspect.cleandoc(schema.__doc__ or "")
    return "" if doc.startswith(f"{schema.__name__}(") else doc


def _shown(default: Any) -> str:
    if default == MISSING:
        return "(required)"
    if isinstance(default, Enum):
        return default.name
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return repr(default) if isinstance(default, str) and ("\n" in default or not default.strip()) else f"{default}"


def _wrapped(head: str, doc: str) -> str:
    """``head: doc``, the meaning aligned in a column of its own."""
    column = 46
    lines = textwrap.wrap(doc, 120 - column) or [""]
    indented = [" " * column + line for line in lines]
    if len(head) <= column - 2:
        indented[0] = f"{head:<{column}}{lines[0]}"
    else:
        indented.insert(0, head)
    return "\n".join(line.rstrip() for line in indented).rstrip()


def _first_comment(path: Path) -> str:
    comments = (line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((c for c in comments if not c.startswith("@package")), "")


def _default_choices(config_dir: Path) -> dict[str, str]:
    root = OmegaConf.load(config_dir / "config.yaml")
    assert isinstance(root, DictConfig)
    entries = [entry for entry in root["defaults"] if not isinstance(entry, str)]
    return {group: choice for entry in entries for group, choice in entry.items()}
