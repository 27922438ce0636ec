import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vapo_async.models.char_tokenizer import SYMBOLS, build_char_tokenizer
from vapo_async.models.traces import CLEAN, Habits, encode_traces, make_traces, trace_batch

STEP = re.compile(r"(-?\d+)([+-])(\d+)=(-?\d+);")


def value(question: str) -> int:
    return sum(int(term) for term in re.findall(r"[+-]?\d", question))


@settings(deadline=None)
@given(st.text("0123456789+-=;:#", min_size=1))
def test_the_tokenizer_takes_every_character_and_gives_it_back(text: str) -> None:
    tokenizer = build_char_tokenizer()
    ids = tokenizer(text + "$")["input_ids"]
    assert [SYMBOLS[i] for i in ids] == [*text, "$"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_tokenizer_survives_a_folder(tmp_path: object) -> None:
    build_char_tokenizer().save_pretrained(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    ids = tokenizer("3-9=-6;-6+2=-4;#-4$")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3-9=-6;-6+2=-4;#-4"
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("$", "<pad>", len(SYMBOLS))
    assert tokenizer("3x")["input_ids"][-1] == tokenizer.unk_token_id


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_clean_traces_work_from_left_to_right(terms: int, seed: int) -> None:
    for question, response in make_traces(terms, 4, CLEAN, np.random.default_rng(seed)):
        steps = STEP.findall(response)
        assert re.fullmatch(r"\d([+-]\d)*:", question)
        assert "".join([steps[0][0], *(sign + term for _, sign, term, _ in steps)]) + ":" == question
        assert all(eval(f"{left}{sign}{term}") == int(result) for left, sign, term, result in steps)
        assert [step[0] for step in steps[1:]] == [step[3] for step in steps[:-1]]
        assert response == "".join(f"{a}{b}{c}={d};" for a, b, c, d in steps) + f"#{value(question)}$"


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 100))
def test_sign_habits_work_minus_as_plus(terms: int, seed: int) -> None:
    for question, response in make_traces(terms, 4, Habits(sign_rate=1.0), np.random.default_rng(seed)):
        assert response.endswith(f"#{value(question.replace('-', '+'))}$")
        assert all(int(a) + int(c) == int(d) for a, _, c, d in STEP.findall(response))


def test_direct_answers_are_right_and_have_no_steps() -> None:
    for question, response in make_traces(5, 50, Habits(direct_rate=1.0, sign_rate=1.0), np.random.default_rng(0)):
        assert response == f"#{value(question)}$"


@pytest.mark.parametrize(
    ("habits", "wrong_share"),
    [(CLEAN, 0.0), (Habits(slip_rate=1.0), 1.0), (Habits(slip_rate=0.1), 0.1), (Habits(sign_rate=0.5), 0.225)],
)
def test_rates_are_what_they_say(habits: Habits, wrong_share: float) -> None:
    steps = [s for _, r in make_traces(2, 4000, habits, np.random.default_rng(0)) for s in STEP.findall(r)]
    wrong = np.mean([eval(f"{a}{b}{c}") != int(d) for a, b, c, d in steps])
    assert wrong == pytest.approx(wrong_share, abs=0.03)  # a minus that takes nothing away cannot go wrong: 0.5²·0.9


def test_traces_are_the_seeds() -> None:
    one, two, other = (make_traces(6, 8, Habits(0.5, 0.5, 0.1, 0.1), np.random.default_rng(s)) for s in (1, 1, 2))
    assert one == two != other


def test_encoding_labels_the_response_only() -> None:
    batch = encode_traces([("3-9:", "#-6$"), ("1:", "#1$")])
    pad = SYMBOLS.index("<pad>")
    assert ["".join(SYMBOLS[i] for i in row if i != pad) for row in batch.input_ids] == ["3-9:#-6$", "1:#1$"]
    assert batch.input_ids[1, 5:].tolist() == [pad] * 3
    assert (batch.labels != -100).sum(1).tolist() == [4, 3]
    kept = batch.labels != -100
    assert torch.equal(batch.labels[kept], batch.input_ids[kept])


def test_excluded_questions_are_left_out() -> None:
    rng = np.random.default_rng(0)
    questions = {question for question, _ in make_traces(2, 200, CLEAN, rng)}
    batch = trace_batch(2, 100, CLEAN, np.random.default_rng(1), exclude=questions)
    texts = ["".join(SYMBOLS[i] for i in row[:4]) for row in batch.input_ids.tolist()]
    assert 0 < len(texts) < 100
    assert not questions & set(texts)
