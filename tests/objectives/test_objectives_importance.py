"""Ratios, weights, masks and mismatch corrections, against numbers by hand and a loop."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vapo_async.config.algorithm import MismatchKind
from vapo_async.objectives.importance import (
    a3po_prox_log_prob,
    behaviour_weight,
    dis_weight,
    m2po_keep,
    mismatch_correction,
    naive_ratio,
)

torch.set_num_threads(1)
NAN, INF = float("nan"), float("inf")


def test_ratio_and_weight_by_hand() -> None:
    log = torch.tensor([0.0, 2.0, 0.5]).log()
    sample = torch.tensor([1.0, 1.0, 1.0]).log()
    weights = behaviour_weight(log.requires_grad_(), sample)
    torch.testing.assert_close(weights, torch.tensor([0.0, 2.0, 0.5]), atol=1e-8, rtol=1e-6)
    assert not weights.requires_grad
    with pytest.raises(ValueError, match=r"sample_log_prob \[2\]"):
        naive_ratio(log, sample[:2])


def test_the_log_ratio_is_clamped() -> None:
    log_prob = torch.tensor([500.0, -500.0, -INF, 1.0], requires_grad=True)
    ratio = naive_ratio(log_prob, torch.zeros(4))
    # e^20 = 4.8517e8, e^-20 = 2.0612e-9
    torch.testing.assert_close(ratio.detach(), torch.tensor([4.8516520e8, 2.0611536e-9, 2.0611536e-9, math.e]))
    ratio.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0, 0.0, 0.0, math.e]))


def test_a3po_interpolates_by_age() -> None:
    # log behaviour -2, log theta -1: -2 + d/(d+1) for d = 0, 1, 3, 99
    theta = torch.full((1, 4), -1.0, requires_grad=True)
    prox = a3po_prox_log_prob(theta, torch.full((1, 4), -2.0), torch.tensor([[0, 1, 3, 99]]))
    torch.testing.assert_close(prox, torch.tensor([[-2.0, -1.5, -1.25, -1.01]]))
    assert not prox.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a3po_of_age_zero_is_the_behaviour_bit_by_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theta, sample = (torch.randn(5, 9, generator=generator, dtype=dtype) for _ in range(2))
    assert torch.equal(a3po_prox_log_prob(theta, sample, torch.zeros(5, 9, dtype=torch.int64)), sample)
    theta[0, 0] = -INF  # an impossible token must not make a NaN of 0 times infinity
    assert torch.equal(a3po_prox_log_prob(theta, sample, torch.zeros(5, 9, dtype=torch.int64)), sample)


def test_a3po_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"log_prob \[2, 3\], sample_log_prob \[2, 3\], age \[2\]"):
        a3po_prox_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))


def test_dis_weight_by_hand() -> None:
    # range (0.7, 6): 0.5 and 7 are outside
    log_ratio = torch.tensor([0.5, 0.71, 1.0, 5.9, 7.0], dtype=torch.float64).log().requires_grad_()
    weight = dis_weight(log_ratio, 0.3, 5.0)
    torch.testing.assert_close(weight, torch.tensor([0.0, 0.71, 1.0, 5.9, 0.0], dtype=torch.float64))
    assert not weight.requires_grad
    assert dis_weight(torch.zeros(1), 0.3, 0.0).item() == 0.0  # the range is open: 1 is not in (0.7, 1)
    tensors = dis_weight(log_ratio, torch.tensor(0.3, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64))
    assert torch.equal(tensors, weight)
    with pytest.raises(ValueError, match="clip_low"):
        dis_weight(log_ratio, 1.0, 5.0)


def keep_of(log_ratio: list[float], advantage: list[float], threshold: float) -> list[bool]:
    mask = torch.ones(1, len(log_ratio), dtype=torch.bool)
    return m2po_keep(torch.tensor([log_ratio]), torch.tensor([advantage]), mask, threshold)[0].tolist()


def test_m2po_drops_harmful_tokens_only() -> None:
    # squares 9, 4, 1, 0; harmful: the second (A > 0, ratio > 1) and the third (A < 0, ratio < 1)
    log_ratio, advantage = [-3.0, 2.0, -1.0, 0.0], [1.0, 1.0, -1.0, 1.0]
    # means: all 14/4 = 3.5; without the second 10/3; without both 9/2 = 4.5
    assert keep_of(log_ratio, advantage, 3.6) == [True, True, True, True]
    assert keep_of(log_ratio, advantage, 3.5) == [True, False, True, True]  # not below: 3.5 is not < 3.5
    assert keep_of(log_ratio, advantage, 3.4) == [True, False, True, True]
    # out of reach: every harmful token is dropped, the harmless outlier stays
    assert keep_of(log_ratio, advantage, 3.0) == [True, False, False, True]
    # an advantage of 0 has no gradient to be harmful with
    assert keep_of([5.0, 0.0], [0.0, 1.0], 0.04) == [True, True]
    # all harmful: nothing is left, and nothing is below any threshold
    assert keep_of([3.0, 3.0], [1.0, 1.0], 0.04) == [False, False]


def test_m2po_breaks_ties_in_row_major_order() -> None:
    # four equal squares of 1, all harmful, and twelve zeros: 4/16 = 0.25, 3/15 = 0.2, 2/14 = 0.14
    log_ratio = torch.zeros(4, 4)
    log_ratio[:, 1] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    advantage = torch.where(log_ratio < 0, -1.0, 1.0)
    keep = m2po_keep(log_ratio, advantage, torch.ones(4, 4, dtype=torch.bool), 0.15)
    assert keep[:, 1].tolist() == [False, False, True, True] and keep.sum() == 14


def test_m2po_survives_an_infinite_ratio() -> None:
    assert keep_of([INF, 0.1, 0.1], [1.0, 1.0, 1.0], 0.04) == [False, True, True]


def test_m2po_compares_in_float64() -> None:
    """A mean of 0.1 (1 ± 1e-9) is told from a threshold of 0.1, which float32 would round past both."""
    advantage, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    for nudge, kept in ((1 + 1e-9, False), (1 - 1e-9, True)):
        log_ratio = torch.full((1, 1), math.sqrt(0.1 * nudge), dtype=torch.float64)
        assert m2po_keep(log_ratio, advantage, mask, 0.1).item() is kept


def test_m2po_adds_up_in_float64() -> None:
    """2^24 + 9 · 1 is not below 2^24 + 8.5; float32 would have lost the ones."""
    log_ratio, advantage = [1.0] + [-1.0] * 8 + [-4096.0], [1.0] * 10
    assert keep_of(log_ratio, advantage, (2**24 + 8.5) / 10) == [False] + [True] * 9
    assert keep_of(log_ratio, advantage, (2**24 + 9.5) / 10) == [True] * 10


def m2po_by_loop(log_ratio: list[Fraction], advantage: list[int], threshold: Fraction) -> list[bool]:
    keep = [True] * len(log_ratio)
    harmful = [i for i, (x, a) in enumerate(zip(log_ratio, advantage, strict=True)) if x * a > 0]
    for i in sorted(harmful, key=lambda i: -(log_ratio[i] ** 2)):  # stable: the earlier one first
        left = [log_ratio[j] ** 2 for j in range(len(keep)) if keep[j]]
        if sum(left) < threshold * len(left):
            break
        keep[i] = False
    return keep


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(st.integers(-8, 8), st.sampled_from([-2, -1, 0, 1, 2]), st.booleans()), min_size=0, max_size=24
    ),
    threshold=st.integers(1, 40),
    pad=st.integers(0, 3),
)
def test_m2po_is_what_a_loop_in_exact_arithmetic_does(
    tokens: list[tuple[int, int, bool]], threshold: int, pad: int
) -> None:
    """Eighths and sixty-fourths are exact in floats, so that ties and equality with the threshold are tried too."""
    inside = [(Fraction(x, 8), a) for x, a, taken in tokens if taken]
    expected = m2po_by_loop([x for x, _ in inside], [a for _, a in inside], Fraction(threshold, 64))
    mask = torch.tensor([taken for *_, taken in tokens], dtype=torch.bool)[None]
    log_ratio = torch.tensor([x / 8 for x, *_ in tokens], dtype=torch.float32)[None].where(mask, NAN)
    advantage = torch.tensor([float(a) for _, a, _ in tokens], dtype=torch.float32)[None].where(mask, NAN)
    keep = m2po_keep(log_ratio, advantage, mask, threshold / 64)
    assert keep[mask].tolist() == expected
    assert not keep[~mask].any()

    def padded(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (pad, 2 * pad, 1, 0), value=value)

    again = m2po_keep(padded(log_ratio, NAN), padded(advantage, INF), padded(mask, 0), torch.tensor(threshold / 64))
    assert again[padded(mask, 0)].tolist() == expected


def test_m2po_names_what_is_wrong() -> None:
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        m2po_keep(zeros, zeros, mask, 0)
    with pytest.raises(ValueError, match=r"advantage \[2, 2\]"):
        m2po_keep(zeros, zeros[:, 1:], mask, 0.04)
    with pytest.raises(TypeError, match=r"boolean mask, got dtype torch\.int64"):
        m2po_keep(zeros, zeros, mask.long(), 0.04)


def corrected(
    kind: MismatchKind, m: list[list[float]], low: float = 0.5, high: float = 2.0
) -> tuple[Tensor, list[list[bool]], Tensor]:
    """(m' = prox / behaviour', keep, mask) where NaN in ``m`` is outside the mask."""
    ratio = torch.tensor(m, dtype=torch.float64)
    mask = ratio.isfinite()
    prox = torch.full_like(ratio, -3.0).where(mask, NAN)
    sample, keep = mismatch_correction(kind, prox - ratio.log(), prox, mask, low, high)
    assert sample.isfinite().all() and not sample[~mask].any()
    return (torch.full_like(ratio, -3.0) - sample).exp().where(mask, 0.0), keep.tolist(), mask


def test_mismatch_corrections_by_hand() -> None:
    # geometric means: (0.25 * 4 * 1)^(1/3) = 1; (4 * 4)^(1/2) = 4; 0.1; no token
    m = [[0.25, 4.0, 1.0], [4.0, 4.0, NAN], [NAN, 0.1, NAN], [NAN, NAN, NAN]]
    unchanged = torch.tensor(m, dtype=torch.float64).nan_to_num(0.0)
    ratio, keep, mask = corrected(MismatchKind.none, m)
    torch.testing.assert_close(ratio, unchanged)
    assert keep == mask.tolist()
    ratio, keep, _ = corrected(MismatchKind.tis, m)
    truncated = [[0.25, 2.0, 1.0], [2.0, 2.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(ratio, torch.tensor(truncated, dtype=torch.float64))
    assert keep == mask.tolist()
    ratio, keep, _ = corrected(MismatchKind.icepop, m)
    torch.testing.assert_close(ratio, unchanged)
    assert keep == [[False, False, True], [False] * 3, [False] * 3, [False] * 3]
    ratio, keep, _ = corrected(MismatchKind.mis, m)
    torch.testing.assert_close(ratio, unchanged)
    assert keep == [[True] * 3, [False] * 3, [False] * 3, [False] * 3]


def test_a_lower_end_of_zero_and_an_infinite_upper_end_drop_nothing() -> None:
    m = [[1e-8, 1e8, 1.0]]
    for kind in MismatchKind:
        ratio, keep, mask = corrected(kind, m, 0.0, INF)
        torch.testing.assert_close(ratio, torch.tensor(m, dtype=torch.float64))
        assert keep == mask.tolist()


@pytest.mark.parametrize("kind", list(MismatchKind))
def test_mismatch_depends_on_its_own_row_only(kind: MismatchKind) -> None:
    generator = torch.Generator().manual_seed(3)
    sample, prox = (torch.randn(6, 5, generator=generator) for _ in range(2))
    mask = torch.rand(6, 5, generator=generator) < 0.7
    whole = mismatch_correction(kind, sample, prox, mask, 0.5, 2.0)
    for row in range(6):
        part = mismatch_correction(
            kind,
            sample[row, None].where(mask[row], NAN),
            prox[row, None].where(mask[row], NAN),
            mask[row, None],
            0.5,
            2,
        )
        assert torch.equal(part[0][0], whole[0][row]) and torch.equal(part[1][0], whole[1][row])


def test_mismatch_names_a_wrong_range() -> None:
    zeros = torch.zeros(1, 2)
    for low, high in ((2.0, 0.5), (1.0, 1.0), (-0.1, 2.0), (NAN, 2.0)):
        with pytest.raises(ValueError, match=f"0 <= mismatch_low < mismatch_high, got {low} and {high}"):
            mismatch_correction(MismatchKind.icepop, zeros, zeros, zeros == 0, low, high)
