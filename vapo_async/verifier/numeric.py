"""Plain numbers, compared exactly. Bounded work for any text: no power is ever computed beyond 10^±400."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
"""Longer numbers and larger powers of ten are left to others."""
_ROUNDED_PLACES = 6
"""A decimal with at least so many places may stand for a number that has more (math-verify's rule)."""

_INT = r"(?:\d{1,3}(?:(?:,|\{,\}|\\,|\\!|,\\!|\\ | |~)\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INT}(?:\.\d*)?|\.\d+)"
_BRACE = r"\s?\{{\s?(?P<{}>-?\d+(?:\.\d+)?)\s?\}}"
_CURRENCY = r"(?:\\?\$|[€£¥])?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s?{_CURRENCY}\s?(?P<inner>-?)(?:"
    rf"(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[-+]?\d{{1,3}})|\s?(?:\\times|\\cdot|\*|×)\s?10\s?\^\s?(?:\{{(?P<ten>[-+]?\d{{1,3}})\}}|(?P<ten1>\d)))?"
    rf"|(?P<num>\d+)\s?/\s?(?P<den>\d+)"
    rf"|\\frac(?:{_BRACE.format('num2')}{_BRACE.format('den2')}|\s?(?P<num1>\d)\s?(?P<den1>\d))"
    r")\s?(?P<percent>\\?%)?"
)
_SEPARATORS = re.compile(r"[^\d.]")


@dataclass(frozen=True)
class PlainNumber:
    """A number as written: ``places`` decimals if it is a decimal, None if a ratio (exact)."""

    value: Fraction
    places: int | None
    percent: bool


def parse_number(text: str) -> PlainNumber | None:
    """``-1,234.5``, ``$5``, ``3/4``, ``\\frac{3}{4}``, ``50\\%``, ``2 \\times 10^{3}``; None for all else."""
    if len(text) > 2 * MAX_DIGITS or not text.isascii():
        return None
    found = _NUMBER.fullmatch(text)
    if found is None:
        return None
    percent = found["percent"] is not None
    sign = -1 if (found["sign"] == "-") != (found["inner"] == "-") else 1
    if found["mantissa"] is None:
        pairs = [(found["num"], found["den"]), (found["num2"], found["den2"]), (found["num1"], found["den1"])]
        top, bottom = next(p for p in pairs if p[0] is not None)
        if len(top) > MAX_DIGITS or len(bottom) > MAX_DIGITS or Fraction(bottom) == 0:
            return None
        return PlainNumber(sign * Fraction(top) / Fraction(bottom), None, percent)
    digits = _SEPARATORS.sub("", found["mantissa"])
    exponent = int(found["e"] or found["ten"] or found["ten1"] or 0)
    if len(digits) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        return None
    places = max(0, len(digits.partition(".")[2]) - exponent)
    return PlainNumber(sign * Fraction(digits) * Fraction(10) ** exponent, places, percent)


def same_number(gold: PlainNumber, pred: PlainNumber) -> bool:
    """Equal exactly, or one rounds the other to at least six places; ``50%`` stands for 50 and for 1/2."""
    if _close(gold, pred):
        return True
    if gold.percent == pred.percent:
        return False
    part, whole = (gold, pred) if gold.percent else (pred, gold)
    places = None if part.places is None else part.places + 2
    return _close(PlainNumber(part.value / 100, places, False), whole)


def _close(a: PlainNumber, b: PlainNumber) -> bool:
    if a.value == b.value:
        return True
    places = min((n.places for n in (a, b) if n.places is not None), default=None)
    if places is None or places < _ROUNDED_PLACES:
        return False
    difference = abs(a.value - b.value)
    return difference * 10**places < 1 and difference * 10**_ROUNDED_PLACES <= max(abs(a.value), abs(b.value))
