"""Finds the final answer in a response. Pure string work, linear in the text's length (megabytes are fine)."""

import re

from vapo_async.config import AnswerStyle

_BOX = re.compile(r"\\boxed\s{0,8}\{")
_BRACE = re.compile(r"\\boxed\s{0,8}\{|\\[\s\S]|[{}]")
# Every repetition is bounded, so that no text makes a match quadratic.
_LEAD_IN = re.compile(
    r"\b(?:answer|result)\b[*_]{0,3}\s{0,8}(?:is|are|:|=)[:*_\s]{0,8}|\A[*_]{0,3}A[*_]{0,3}\s{0,8}:[*_\s]{0,8}", re.I
)
_CLOSING = " \t*`.。"


def extract_answer(text: str, style: AnswerStyle) -> str | None:
    """The answer that ``text`` ends with, stripped, or None where it states none. Never raises."""
    match style:
        case AnswerStyle.boxed:
            answer = last_boxed(text)
        case AnswerStyle.hash:
            answer = after_hash(text)
        case AnswerStyle.last_line:
            answer = last_line(text)
    return answer or None


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{...}`` whose braces balance; None if there is none.

    Of nested boxes the inner one counts. Escaped braces (``\\{``) are text.
    """
    last = None
    for last in _BOX.finditer(text):  # noqa: B007 (the last match is what is wanted)
        pass
    if last is None:
        return None
    depth = 1
    for token in _BRACE.finditer(text, last.end()):
        depth += _step(token.group())
        if depth == 0:
            return text[last.end() : token.start()].strip()
    return _last_closed_box(text)


def _last_closed_box(text: str) -> str | None:
    """The slow way, one pass with a stack: for texts whose very last box never closes."""
    open_at: list[int] = []  # where the content of each open brace starts; negative for a plain brace
    best: tuple[int, int] | None = None
    for token in _BRACE.finditer(text):
        step = _step(token.group())
        if step > 0:
            open_at.append(token.end() if token.group() != "{" else -1)
        elif step < 0 and open_at:
            start = open_at.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]].strip()


def _step(token: str) -> int:
    """+1 for an opening brace, −1 for a closing one, 0 for an escaped character."""
    if token == "}":
        return -1
    return 1 if token == "{" or token.startswith("\\boxed") else 0


def after_hash(text: str) -> str | None:
    """The first line of what follows the last ``####``, or else the last ``#``; None if there is neither."""
    _, mark, tail = text.rpartition("####")
    if not mark:
        _, mark, tail = text.rpartition("#")
    if not mark:
        return None
    return tail.lstrip().partition("\n")[0].strip()


def last_line(text: str) -> str | None:
    """The last line that is not empty, without "The answer is", "Answer:", "A:" before it and a full stop after it."""
    line = text.rstrip().rpartition("\n")[2].strip()
    end = 0
    for lead_in in _LEAD_IN.finditer(line):
        end = lead_in.end()
    return line[end:].strip().rstrip(_CLOSING).strip()
