"""Where the answer stands in a response."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.config import AnswerStyle
from vapo_async.verifier import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{x = \boxed{3}}", "3"),
        (r"\boxed {7}", "7"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"{ stray \boxed{7} } }", "7"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        ("42", None),
        ("", None),
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert extract_answer(text, AnswerStyle.boxed) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("9 + 3 = 12\n#### 1,234", "1,234"),
        ("3-9=-6;-6+2=-4;#-4", "-4"),
        ("#1 #2", "2"),
        ("#### 5 \nand more", "5"),
        ("####\n5", "5"),
        ("#", None),
        ("-4", None),
    ],
)
def test_hash(text: str, answer: str | None) -> None:
    assert extract_answer(text, AnswerStyle.hash) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("work\nThe answer is 5.", "5"),
        ("work\nA: 26\n\n", "26"),
        ("**Final answer:** $\\frac12$.", "$\\frac12$"),
        ("So the result is: 3.5", "3.5"),
        ("7", "7"),
        ("x = 7", "x = 7"),
        ("The answer is:", None),
        (" \n\t\n", None),
    ],
)
def test_last_line(text: str, answer: str | None) -> None:
    assert extract_answer(text, AnswerStyle.last_line) == answer


@pytest.mark.parametrize("style", list(AnswerStyle))
@pytest.mark.parametrize("piece", ["\\boxed{", "{", "}", "#", "answer is ", "answer  ", "A:", "\\", " ", "\n"])
def test_megabytes_take_seconds_at_most(style: AnswerStyle, piece: str) -> None:
    text = piece * (2_000_000 // len(piece))
    start = time.perf_counter()
    extract_answer("\\boxed{1" + text, style)
    assert time.perf_counter() - start < 10  # seconds; linear work takes about one


@given(st.text(alphabet="\\boxed{}#: \nanswer1$"), st.sampled_from(AnswerStyle))
def test_never_raises_and_never_empty(text: str, style: AnswerStyle) -> None:
    assert extract_answer(text, style) != ""


@given(st.text(alphabet="abc{}\\#$ "), st.integers())
def test_finds_what_was_boxed_last(before: str, answer: int) -> None:
    assert extract_answer(f"{before} \\boxed{{{answer}}} ok", AnswerStyle.boxed) == str(answer)
