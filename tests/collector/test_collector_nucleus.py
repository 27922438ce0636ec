"""Nucleus sampling: by hand, as Hugging Face does it, and by the embedded engine with a full forward pass beside it."""

import math

import pytest
import torch
from conftest import tiny_policy
from engine_runs import TEMPERATURE, VOCAB, make_engine, prompts, run_all
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, TopPLogitsWarper

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.collector.nucleus import nucleus
from vapo_async.schema import Response


def kept(logits: Tensor, top_p: float) -> list[list[int]]:
    """Which tokens of each row are in; those that are keep their logits."""
    cut = nucleus(logits, top_p)
    inside = cut.isfinite()
    assert torch.equal(cut[inside], logits[inside]) and bool((cut[~inside] == -math.inf).all())
    return [row.nonzero()[:, 0].tolist() for row in inside]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.96, [0, 1, 2, 3]),
        (0.94, [0, 2, 3]),
        (0.81, [0, 2, 3]),
        (0.79, [0, 3]),
        (0.51, [0, 3]),
        (0.49, [3]),
        (1e-9, [3]),
    ],
)
def test_nucleus_by_hand(top_p: float, expected: list[int]) -> None:
    """Probabilities 0.3, 0.05, 0.15, 0.5: sums from the likeliest on 0.5, 0.8, 0.95, 1."""
    logits = torch.tensor([[0.3, 0.05, 0.15, 0.5]]).log() + 2
    assert kept(logits, top_p) == [expected]
    renormalised = nucleus(logits, top_p).softmax(-1)[0, expected]
    probabilities = torch.tensor([0.3, 0.05, 0.15, 0.5])[expected]
    torch.testing.assert_close(renormalised, probabilities / probabilities.sum())


def test_the_edge_belongs_to_the_smaller_set() -> None:
    """Two or four equal tokens have probabilities without rounding: 1/2 is reached by one of two, by two of four."""
    for tokens in (2, 4):
        even = torch.zeros(1, tokens)
        assert [len(kept(even, top_p)[0]) for top_p in (0.5, 0.51, 1.0)] == [tokens // 2, tokens // 2 + 1, tokens]


def test_rows_do_not_know_each_other() -> None:
    rows = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.98, 0.01, 0.01]]).log()
    assert kept(rows, 0.8) == [[0, 1], [1, 2], [0]]


logits_rows = st.integers(1, 12).flatmap(
    lambda tokens: st.lists(st.lists(st.integers(-6, 6), min_size=tokens, max_size=tokens), min_size=1, max_size=4)
)


@given(rows=logits_rows, scale=st.sampled_from([0.25, 1.0, 3.7]), top_p=st.floats(1e-6, 1))
def test_nucleus_is_hugging_faces(rows: list[list[int]], scale: float, top_p: float) -> None:
    """Whole numbers, so many tokens are equally likely."""
    logits = torch.tensor(rows) * scale
    assert torch.equal(nucleus(logits, top_p), TopPLogitsWarper(top_p)(None, logits))


@given(rows=logits_rows, top_p=st.floats(1e-3, 0.999))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(rows: list[list[int]], top_p: float) -> None:
    logits = torch.tensor(rows, dtype=torch.float64) / 3
    for row, tokens in zip(logits.softmax(-1), kept(logits, top_p), strict=True):
        rest = sorted(set(range(len(row))) - set(tokens))
        inside = row[tokens]
        assert inside.sum() >= top_p - 1e-12
        assert len(tokens) == 1 or inside.sum() - inside.min() < top_p + 1e-12
        assert not rest or row[rest].max() <= inside.min()


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.1, math.nan])
def test_wrong_top_p(top_p: float) -> None:
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\], got"):
        nucleus(torch.zeros(1, 3), top_p)


def nucleus_log_probs(policy: PreTrainedModel, prompt: tuple[int, ...], response: Response, top_p: float) -> Tensor:
    """Of a full forward pass and Hugging Face's warper, [tokens]; −inf outside of the nucleus."""
    tokens = torch.tensor([[*prompt, *response.token_ids]])
    with torch.no_grad():
        logits = policy(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
    log_probs: Tensor = TopPLogitsWarper(top_p)(None, logits).log_softmax(-1)
    return log_probs.gather(1, tokens[0, len(prompt) :, None])[:, 0]


def generated(policy: PreTrainedModel, **settings: object) -> list[Completion]:
    engine = make_engine(policy, **settings)
    for i, prompt in enumerate(prompts(6)):
        engine.submit(GenerationRequest(i, prompt, 3, 20))
    return sorted(run_all(engine), key=lambda c: (c.request_id, c.response.sample_index))


def test_log_probs_are_of_the_nucleus() -> None:
    """Which is after the temperature, and not of all tokens."""
    policy, top_p = tiny_policy(VOCAB), 0.7
    found, expected, of_all = [], [], []
    for completion in generated(policy, top_p=top_p):
        prompt, response = prompts(6)[completion.request_id], completion.response
        found.append(torch.tensor(response.log_probs))
        expected.append(nucleus_log_probs(policy, prompt, response, top_p))
        of_all.append(nucleus_log_probs(policy, prompt, response, 1.0))
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=2e-5, rtol=0)
    gap = torch.cat(found) - torch.cat(of_all)
    assert -math.log(0.7) + 1e-4 >= gap.max() > 0.1, "a nucleus holds at least 0.7"
    assert gap.min() >= -1e-4


def test_sampling_follows_the_nucleus() -> None:
    policy, prompt, samples, top_p = tiny_policy(VOCAB, seed=2), prompts(1, seed=5)[0], 4096, 0.8
    engine = make_engine(policy, max_slots=512, top_p=top_p)
    engine.submit(GenerationRequest(0, prompt, samples, 1))
    first = torch.tensor([c.response.token_ids[0] for c in run_all(engine)])
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[:, -1].float() / TEMPERATURE
    expected = TopPLogitsWarper(top_p)(None, logits).softmax(-1)[0] * samples
    observed, inside = torch.bincount(first, minlength=VOCAB).double(), expected > 0
    assert 3 <= inside.sum() < VOCAB and observed[~inside].sum() == 0
    statistic = ((observed - expected)[inside] ** 2 / expected[inside]).sum().double()
    degrees = (inside.sum() - 1).double() / 2
    assert torch.special.gammaincc(degrees, statistic / 2) > 1e-3  # the chi-square test's p-value


def test_a_small_top_p_is_greedy_decoding() -> None:
    policy = tiny_policy(VOCAB)
    assert generated(policy, top_p=1e-6) == generated(policy, temperature=0.0), "log-probs 0, too"
    assert generated(policy, top_p=1.0) == generated(policy) != generated(policy, top_p=1e-6)
