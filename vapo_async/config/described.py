"""Files that describe something beside the configuration, such as a cluster: YAML with keys of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from vapo_async.config.errors import ConfigError

T = TypeVar("T")


def read_described(what: str, path: Path, parse: Callable[[object], T]) -> T:
    """What ``parse`` makes of a YAML file.

    Raises:
        ConfigError: one line for any mistake, with the file's name; ``parse`` raises it for one in what the file holds.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        return parse(loaded)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
