"""Lengths, group advantages, whitening and explained variance against hand-computed numbers."""

import pytest
import torch
from advantage_problems import NAN, bits
from hypothesis import given, settings
from hypothesis import strategies as st

from vapo_async.objectives.advantage import group_advantage, length_adaptive_lambda, trajectory_lengths
from vapo_async.objectives.statistics import explained_variance, explained_variance_by, whiten

torch.set_num_threads(1)


def test_length_adaptive_lambda_by_hand() -> None:
    got = length_adaptive_lambda(torch.tensor([[0, 1, 20], [40, 400, 1]]), 0.05)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.95, 0.0]], dtype=torch.float64))
    assert length_adaptive_lambda(torch.tensor([10**12]), 1.5).item() <= 1.0
    assert length_adaptive_lambda(torch.tensor(40), 0.05).shape == ()


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN])
def test_length_adaptive_lambda_refuses_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be positive"):
        length_adaptive_lambda(torch.tensor([3]), alpha)


def test_trajectory_lengths_by_hand() -> None:
    mask, ends = bits("01101110", "11111111", "00000000"), bits("00100010", "00010000", "00000000")
    assert trajectory_lengths(mask).tolist() == [[0, 5, 5, 0, 5, 5, 5, 0], [8] * 8, [0] * 8]
    assert trajectory_lengths(mask, ends).tolist() == [[0, 2, 2, 0, 3, 3, 3, 0], [4] * 8, [0] * 8]
    last = bits("00000010", "00000001", "00000000")
    assert torch.equal(trajectory_lengths(mask, last), trajectory_lengths(mask))
    for shape in ((0, 4), (3, 0)):
        empty = torch.zeros(shape, dtype=torch.bool)
        assert trajectory_lengths(empty).shape == trajectory_lengths(empty, empty).shape == shape


def test_group_advantage_by_hand() -> None:
    mask = torch.tensor([[False, True], [True, True], [True, False], [True, True], [True, True], [True, True]])
    rewards = torch.tensor([1.0, 0.1, -1.0, 0.1, 0.1, 3.0])
    ids = torch.tensor([7, 9, 7, 9, 9, 8])  # a mixed group, a group of equal rewards, a group of one
    got = group_advantage(rewards, ids, mask)
    half = 1 / (2**0.5 + 1e-6)  # unbiased std of (1, -1) is sqrt(2)
    expected = torch.tensor([[0, half], [0, 0], [-half, 0], [0, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(got, expected)
    assert not got[[1, 3, 4, 5]].any()


def test_whiten_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    assert not whiten(x, mask & (x == 1)).any()
    assert not whiten(x, torch.zeros_like(mask)).any()


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    target = torch.tensor([[1.0, 2.0, 3.0, NAN]])
    assert explained_variance(target, target, mask).item() == 1.0
    assert explained_variance(target + 5, target, mask).item() == 1.0
    assert explained_variance(torch.zeros_like(target), target, mask).item() == 0.0
    assert explained_variance(-target, target, mask).item() == pytest.approx(-3.0)
    assert explained_variance(target, torch.full_like(target, 0.1), mask).item() == 0.0
    assert explained_variance(target, target, torch.zeros_like(mask)).item() == 0.0


def test_explained_variance_by_bucket() -> None:
    mask = torch.tensor([[True] * 5 + [False], [True] * 3 + [False] * 3])
    target = torch.tensor([[1.0, 2.0, 3.0, 5.0, 5.0, NAN], [0.0, 4.0, 8.0, NAN, NAN, NAN]])
    value = torch.tensor([[1.0, 2.0, 3.0, 1.0, 9.0, NAN], [0.0, 0.0, 0.0, NAN, NAN, NAN]])
    bucket = torch.tensor([[0, 0, 0, 1, 1, 99], [3, 3, 3, -1, 99, 0]])
    got = explained_variance_by(value, target, mask, bucket, 5)
    assert got.dtype == torch.float64
    assert got[[0, 1, 3]].tolist() == [1.0, 0.0, 0.0]
    assert got.isnan().tolist() == [False, False, True, False, True]
    for b in (0, 1, 3):
        assert got[b].item() == pytest.approx(explained_variance(value, target, mask & (bucket == b)).item())
    with pytest.raises(ValueError, match=r"bucket \[2, 5\]"):
        explained_variance_by(value, target, mask, bucket[:, :5], 5)
    assert explained_variance_by(value, target, mask & False, bucket, 2).isnan().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5))
def test_explained_variance_by_equals_each_bucket_alone(seed: int, buckets: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value, target = torch.randn(2, 3, 20, generator=generator)
    mask = torch.rand(3, 20, generator=generator) > 0.3
    bucket = torch.randint(buckets, (3, 20), generator=generator)
    got = explained_variance_by(value, target, mask, bucket, buckets)
    for b in range(buckets):
        inside = mask & (bucket == b)
        if inside.any():
            r, error = target[inside].double(), (target - value)[inside].double()
            alone = 1 - error.var(correction=0) / r.var(correction=0) if len(r.unique()) > 1 else torch.zeros(())
            torch.testing.assert_close(got[b], alone.double(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(explained_variance(value, target, inside), got[b])
        else:
            assert got[b].isnan()
