"""What the checks of the configuration are made of: requirements of one value each.

A violation raises a :class:`~vapo_async.config.ConfigError` of one line: key, what it must be, what was found, what to
do. Comparisons are written so that NaN fails them.
"""

import math
import re

from vapo_async.config.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def require(holds: bool, key: str, value: object, expected: str, hint: str = "") -> None:
    """Whatever the others do not say. ``expected`` goes on after "must be"; ``hint`` says why, or what to do."""
    if not holds:
        found = "null" if value is None else repr(value) if isinstance(value, str) else value
        raise ConfigError(f"{key} must be {expected}, found {found}" + (f": {hint}" if hint else ""))


def at_least(key: str, value: float, low: float, hint: str = "") -> None:
    """Finite, and not below ``low``."""
    require(low <= value < math.inf, key, value, f"≥ {low}", hint)


def above(key: str, value: float, low: float, hint: str = "") -> None:
    """Finite, and above ``low``."""
    require(low < value < math.inf, key, value, f"> {low}", hint)


def within(key: str, value: float, low: float, high: float, hint: str = "") -> None:
    """Both ends are allowed."""
    require(low <= value <= high, key, value, f"between {low} and {high}", hint)


def finite(key: str, value: float) -> None:
    """No NaN, no infinity."""
    require(math.isfinite(value), key, value, "a finite number")


def ordered(low_key: str, low: int, high_key: str, high: int) -> None:
    """A range of whole numbers from 1 that is not empty."""
    at_least(low_key, low, 1)
    require(low <= high, low_key, low, f"≤ {high_key} = {high}")


def known_device(key: str, name: str) -> None:
    """By its name only: whether this machine has it is for the process that uses it to see."""
    known = re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None
    require(known, key, name, "cpu, cuda or cuda:<n>")
