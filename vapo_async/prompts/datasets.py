"""Rows of files and of Hugging Face data sets as problems."""

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vapo_async.config import ConfigError
from vapo_async.schema import Problem

_log = logging.getLogger(__name__)
_SUFFIXES = (".jsonl", ".json", ".parquet")


def load_problems(
    path_or_name: str,
    *,
    question_column: str,
    answer_column: str,
    answer_separator: str | None = None,
    hf_config: str | None = None,
    split: str = "train",
    limit: int | None = None,
    skip_incomplete: bool = False,
) -> list[Problem]:
    """Problems of a jsonl, json or parquet file, or else of a Hugging Face data set of that name.

    Column names may be paths into nested rows: ``reward_model.ground_truth``, ``prompt.0.content``. With an
    ``answer_separator`` the answer is what follows its last occurrence. ``limit`` keeps the first rows. A row without
    a question or an answer is an error, or is left out with a warning if ``skip_incomplete``.
    """
    problems: list[Problem] = []
    skipped: list[str] = []
    for place, row in _rows(path_or_name, hf_config, split):
        if limit is not None and len(problems) >= limit:
            break
        try:
            question = _text(row, question_column, "question", place)
            answer = _final(_text(row, answer_column, "answer", place), answer_separator, answer_column, place)
        except _IncompleteRowError:
            if not skip_incomplete:
                raise
            skipped.append(place)
            continue
        problems.append(Problem(len(problems), question, answer))
    if skipped:
        _log.warning("left out %d rows without a question or an answer, the first at %s", len(skipped), skipped[0])
    if not problems:
        raise ConfigError(f"{path_or_name} holds no rows; expected at least one problem")
    return problems


class _IncompleteRowError(ConfigError):
    """A row that lacks its question or its answer."""


def _final(answer: str, separator: str | None, column: str, place: str) -> str:
    """What follows the last ``separator``, if there is one to look for."""
    if separator is None:
        return answer
    _, found, final = answer.rpartition(separator)
    if not found or not final.strip():
        raise _IncompleteRowError(
            f"{place}: column '{column}' has no answer after '{separator}'; correct the row or task.answer_separator, "
            "or leave such rows out with task.skip_incomplete=true"
        )
    return final.strip()


def _rows(path_or_name: str, hf_config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) pairs; rows are counted from 1."""
    path = Path(path_or_name).expanduser()
    if path.is_file():
        match path.suffix:
            case ".jsonl":
                return _jsonl_rows(path)
            case ".json":
                return _json_rows(path)
            case ".parquet":
                return _parquet_rows(path)
        raise ConfigError(f"data file {path} ends in '{path.suffix}'; expected one of {', '.join(_SUFFIXES)}")
    if _looks_like_path(path_or_name):
        raise ConfigError(
            f"data file not found: {path_or_name}; expected a .jsonl, .json or .parquet file, "
            "or the name of a Hugging Face data set"
        )
    return _hub_rows(path_or_name, hf_config, split)


def _looks_like_path(name: str) -> bool:
    """Hub names are ``name`` or ``owner/name`` without a data file's ending."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or name.endswith((*_SUFFIXES, ".csv", ".txt", ".gz"))
        or Path(name).exists()
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise ConfigError(f"{path} holds {_kind(rows)}; expected a list of rows (one object per line: name it .jsonl)")
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place} line {error.lineno}" if b"\n" in text.strip() else place
        raise ConfigError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); correct the file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet: {_one_line(error)}") from error
    return ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _hub_rows(name: str, hf_config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # slow to import, and only needed here

    try:
        rows = datasets.load_dataset(name, hf_config, split=split)
    except Exception as error:
        raise ConfigError(
            f"data set '{name}' (split '{split}') cannot be loaded from Hugging Face: {_one_line(error)}; "
            "give the path of a .jsonl, .json or .parquet file instead"
        ) from error
    return ((f"{name}[{split}] row {number}", row) for number, row in enumerate(rows, start=1))


def _text(row: object, column: str, what: str, place: str) -> str:
    """The non-empty text at a dotted column path."""
    value = row
    for part in column.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch(r"\d+", part) and int(part) < len(value):
            value = value[int(part)]
        else:
            value = None
            break
    text = _normal(value)
    if text is None:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else _kind(row)
        raise _IncompleteRowError(
            f"{place} has no {what} in column '{column}' (found: {keys or 'an empty row'}); correct the row or "
            f"task.{what}_column, or leave such rows out with task.skip_incomplete=true"
        )
    return text


def _normal(value: object) -> str | None:
    """A cell as text: 27.0 → "27"; None where there is nothing usable in it."""
    match value:
        case str():
            return value.strip() or None
        case bool():
            return None
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return str(int(value)) if value.is_integer() else repr(value)
    return None


def _kind(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a number")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
