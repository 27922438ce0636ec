"""Mathematical equivalence of two answers: a pure function of two strings.

Cheap exact checks decide most answers; the rest is for math-verify (SymPy). There are no processes and no time limits
here: hostile text can take for ever or take all memory, so text of a model goes through :class:`~.sandbox.Sandbox`.
"""

import logging
import re

from vapo_async.verifier.extract import last_boxed, last_line
from vapo_async.verifier.numeric import parse_number, same_number
from vapo_async.verifier.without_eval import replace_eval

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ",
     "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
)  # fmt: skip
_WRAPPER = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|textrm|operatorname)\s?\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;: ]|\\q?quad(?![a-zA-Z])|~")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_TIGHT = re.compile(r" ?([^\w\s]) ?")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_POWER = re.compile(r"\*\*\s?(-?\d+)")
# "41 1" would be read as the mixed number 41 + 1: two bare integers side by side are no answer.
_JUXTAPOSED = re.compile(r"(?<![\d.\\])\d+ +\d+(?![\d.]* ?/)")


def equivalent(gold: str, pred: str) -> bool:
    """Whether ``pred`` states the same mathematical object as ``gold``.

    Either may be a bare answer or carry ``\\boxed{}``, ``####`` or a lead-in such as "The answer is". Never raises;
    text that cannot be read is wrong. May hang or exhaust memory on hostile text.
    """
    try:
        return _equivalent(_final(gold), _final(pred))
    except Exception:  # noqa: BLE001 - SymPy raises anything on a model's text, RecursionError and MemoryError included
        return False


def _equivalent(gold: str, pred: str) -> bool:
    if not gold or not pred:
        return False
    plain_gold, plain_pred = _plain(gold), _plain(pred)
    if plain_gold == plain_pred:
        return True
    number_gold, number_pred = parse_number(plain_gold), parse_number(plain_pred)
    if number_gold is not None and number_pred is not None:
        return same_number(number_gold, number_pred)
    if number_gold is not None:
        number_pred = parse_number(_right_side(plain_pred))
        if number_pred is not None:
            return same_number(number_gold, number_pred)
    word = _word(gold)
    if word is not None:  # math-verify reads a word as a product of letters, which makes anagrams equal
        return word == _plain(pred).strip("() ").casefold()
    if _JUXTAPOSED.search(plain_pred) and not _JUXTAPOSED.search(plain_gold):
        return False
    return _symbolic(gold, pred)


def _final(text: str) -> str:
    """The answer inside ``text``; a bare answer comes back as it is, in ASCII where a symbol has a LaTeX name."""
    boxed = last_boxed(text)
    if boxed is not None:
        text = boxed
    elif "####" in text:
        text = text.rpartition("####")[2]
    elif not ("\\begin{" in text or text.lstrip().startswith(("$$", "\\["))):
        text = last_line(text) or ""
    return text.translate(_UNICODE).strip().rstrip("\\").rstrip()


def _plain(text: str) -> str:
    """``text`` without delimiters, spacing commands, a text wrapper and a full stop: for comparing strings."""
    text = _FRACTION.sub(r"\\frac", _SPACING.sub(" ", _unwrap(text))).rstrip(". ")
    return _TIGHT.sub(r"\1", " ".join(text.split()))


def _right_side(text: str) -> str:
    """What follows the last ``=`` of one equation or chain of equations; empty where there is none."""
    left, _, right = text.rpartition("=")
    if not left or left[-1] in "<>!:\\" or "," in left or ";" in left:
        return ""
    return right.strip()


def _unwrap(text: str) -> str:
    """Takes off the math delimiters and the ``\\text{…}`` around a whole answer."""
    for left, right in _DELIMITERS:
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if left not in inner and not inner.endswith("\\"):
                text = inner.strip()
                break
    wrapped = _WRAPPER.fullmatch(text)
    return wrapped[1].strip() if wrapped else text


def _word(gold: str) -> str | None:
    """The word that ``gold`` is, casefolded; None where its letters may be variables."""
    plain = _plain(gold)
    letters = plain.replace(" ", "")
    if not (letters.isascii() and letters.isalpha()):
        return None
    marked = "\\text" in gold or "\\mbox" in gold
    return plain.casefold() if len(letters) >= (2 if marked else 4) else None


def _symbolic(gold: str, pred: str) -> bool:
    """math-verify's verdict."""
    from math_verify import LatexExtractionConfig, parse, verify  # heavy: only where it is needed

    replace_eval()
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns once that time limits are off
    # Without math-verify's plain-text extraction, which would pick a number out of what it cannot read.
    config = [LatexExtractionConfig()]
    parsed_gold = parse(_as_latex(gold), config, parsing_timeout=None)
    parsed_pred = parse(_as_latex(pred), config, parsing_timeout=None)
    return bool(verify(parsed_gold, parsed_pred, timeout_seconds=None))


def _as_latex(text: str) -> str:
    """``text`` between dollars, unless it has mathematics of its own between delimiters."""
    text = _POWER.sub(r"^{\1}", " ".join(text.split())).replace("**", "^")
    inner = _unwrap(text)
    if inner == text and (text.count("$") - text.count("\\$") >= 2 or "\\(" in text or "\\[" in text):
        return text
    inner = inner.replace("\\$", "").replace("$", "")
    if inner.endswith("%"):  # math-verify wants the percent sign outside
        return f"${inner.rstrip('%').rstrip(chr(92))}$%"
    return f"${inner}$"
