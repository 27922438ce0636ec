"""The numbers of the engine mismatch: by hand, against exact divergences, and for all inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vapo_async.objectives.mismatch import Mismatch, engine_mismatch, worst_tokens


def test_mismatch_by_hand() -> None:
    """Δ = log 1.25, −log 2, 0, log 1.05; what the mask leaves out is never read."""
    learner = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 7.0, math.nan]], dtype=torch.float64)
    gap = torch.tensor([[math.log(1.25), -math.log(2), 0.0], [math.log(1.05), 3.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = engine_mismatch(learner - gap, learner, mask)
    assert found.tokens == 4
    assert found.mean == pytest.approx((0.22314355 + 0.69314718 + 0.04879016) / 4, abs=1e-8)
    assert found.max == pytest.approx(0.69314718, abs=1e-8)
    # r − 1 − log r: 0.25 − 0.22314355, −0.5 + 0.69314718, 0, 0.05 − 0.04879016
    assert found.kl == pytest.approx((0.02685645 + 0.19314718 + 0.00120984) / 4, abs=1e-8)
    assert found.outside == 0.5


def test_mismatch_of_nothing_has_no_numbers() -> None:
    found = engine_mismatch(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert found.tokens == 0
    assert all(math.isnan(value) for value in (found.mean, found.max, found.kl, found.outside))


def test_mismatch_kl_is_the_divergence_from_engine_to_learner() -> None:
    """Its mean over the engine's own distribution is KL(engine ‖ learner), not the reverse."""
    torch.manual_seed(0)
    scale = torch.tensor([[2.0], [0.5]])
    engine, learner = (torch.randn(2, 50, dtype=torch.float64) * scale).log_softmax(-1)
    tokens = torch.multinomial(engine.exp(), 200_000, replacement=True)
    found = engine_mismatch(engine[tokens], learner[tokens], torch.ones_like(tokens, dtype=torch.bool))
    forward = float((engine.exp() * (engine - learner)).sum())
    backward = float((learner.exp() * (learner - engine)).sum())
    assert found.kl == pytest.approx(forward, rel=0.02)
    assert abs(forward - backward) > 0.1 * forward, "else this tells nothing"


def test_mismatch_keeps_the_digits_of_small_differences() -> None:
    """Δ of 1e-5 has a KL of 5e-11: exp(Δ) − 1 − Δ in float32 would be nothing but rounding."""
    engine = torch.zeros(1000)
    found = engine_mismatch(engine, engine + 1e-5, torch.ones(1000, dtype=torch.bool))
    assert found.kl == pytest.approx(5e-11, rel=1e-3)
    assert found.mean == pytest.approx(1e-5, rel=1e-6) and found.outside == 0


def test_mismatch_of_what_is_not_finite_is_not_small() -> None:
    """A token that the learner gives no probability, and one that is not a number."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    impossible = engine_mismatch(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -math.inf]]), mask)
    assert impossible.mean == impossible.max == impossible.kl == math.inf and impossible.outside == 0.5
    broken = engine_mismatch(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, math.nan]]), mask)
    assert math.isnan(broken.mean) and math.isnan(broken.max) and broken.outside == 0.5
    assert worst_tokens(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-9.0, math.nan]]), mask, 1) == [(0, 1)]


pairs = st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0), st.booleans()), min_size=1, max_size=30)


@given(pairs)
def test_mismatch_properties(rows: list[tuple[float, float, bool]]) -> None:
    engine, learner, mask = _tensors(rows)
    found = engine_mismatch(engine, learner, mask)
    if not mask.any():
        assert found.tokens == 0
        return
    chosen = [(e, t) for e, t, m in rows if m]
    gaps = [abs(t - e) for e, t in chosen]
    assert found.tokens == len(chosen)
    assert found.mean == pytest.approx(sum(gaps) / len(gaps), abs=1e-12) and found.max == max(gaps)
    assert found.mean <= found.max * (1 + 1e-12)
    assert found.kl >= -1e-15
    expected = sum(not 0.9 <= math.exp(t - e) <= 1.1 for e, t in chosen) / len(chosen)
    assert found.outside == pytest.approx(expected, abs=1e-12)
    assert engine_mismatch(engine, engine, mask) == Mismatch(len(chosen), 0.0, 0.0, 0.0, 0.0)


@given(pairs, st.integers(0, 8))
def test_worst_tokens_are_those_that_sorting_finds(rows: list[tuple[float, float, bool]], count: int) -> None:
    engine, learner, mask = (x.reshape(1, -1).repeat(2, 1) for x in _tensors(rows))
    mask[1] = False
    found = worst_tokens(engine, learner, mask, count)
    gaps = sorted((abs(t - e) for e, t, m in rows if m), reverse=True)
    assert [float((engine - learner)[place].abs()) for place in found] == gaps[:count]
    assert len(set(found)) == len(found) and all(mask[place] for place in found)


def test_mismatch_refuses_what_does_not_fit() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected equal shapes.*learner_log_prob \[2, 2\]"):
        engine_mismatch(x, x[:, :2], mask)
    with pytest.raises(TypeError, match="boolean mask"):
        engine_mismatch(x, x, mask.long())
    with pytest.raises(ValueError, match="expected equal shapes"):
        worst_tokens(x, x, mask[:1], 5)


def _tensors(rows: list[tuple[float, float, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    engine, learner, mask = zip(*rows, strict=True)
    return torch.tensor(engine, dtype=torch.float64), torch.tensor(learner, dtype=torch.float64), torch.tensor(mask)
