"""Advantages and value targets against hand-computed numbers, a plain fp64 loop and TorchRL's own GAE."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate

from vapo_async.objectives.advantage import (
    explained_variance,
    generalized_advantage,
    group_advantage,
    length_adaptive_lambda,
    value_targets,
    whiten,
)

torch.set_num_threads(1)
NAN = float("nan")


def oracle(value: Tensor, reward: Tensor, mask: Tensor, gamma: float, lmbda: Tensor) -> Tensor:
    """The definition, token by token, in fp64."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(mask.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[b, t]:
                v = float(value[b, t])
                delta = float(reward[b, t]) + gamma * next_value - v
                next_advantage = delta + gamma * float(lmbda[b]) * next_advantage
                next_value, out[b, t] = v, next_advantage
    return out


def problem(lengths: list[int], offsets: list[int], seed: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for b, (n, offset) in enumerate(zip(lengths, offsets, strict=True)):
        mask[b, offset : offset + n] = True
    value = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    reward = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return value.where(mask, torch.tensor(NAN)), reward.where(mask, torch.tensor(NAN)), mask


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    offsets = [draw(st.integers(0, 4)) for _ in lengths]
    return problem(lengths, offsets, draw(st.integers(0, 10_000)), 14)


def test_length_adaptive_lambda_by_hand() -> None:
    got = length_adaptive_lambda(torch.tensor([0, 1, 20, 40, 400]), 0.05)
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.0, 0.5, 0.95], dtype=torch.float64))
    assert length_adaptive_lambda(torch.tensor([10**12]), 1.5).item() <= 1.0


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN])
def test_length_adaptive_lambda_refuses_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be positive"):
        length_adaptive_lambda(torch.tensor([3]), alpha)


def test_three_tokens_by_hand() -> None:
    # prompt, three tokens, padding; V = 0.5, 0.25, -0.5; R = 1 at the end; gamma 0.5, lambda 0.5
    value = torch.tensor([[NAN, 0.5, 0.25, -0.5, NAN]])
    reward = torch.tensor([[NAN, 0.0, 0.0, 1.0, NAN]])
    mask = torch.tensor([[False, True, True, True, False]])
    # deltas: 0.125-0.5=-0.375, -0.25-0.25=-0.5, 1+0.5=1.5; factor 0.25
    torch.testing.assert_close(
        generalized_advantage(value, reward, mask, 0.5, 0.5),
        torch.tensor([[0.0, -0.375 + 0.25 * (-0.5 + 0.25 * 1.5), -0.5 + 0.25 * 1.5, 1.5, 0.0]]),
    )
    assert value_targets(value, reward, mask, 1.0, 1.0).tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    assert value_targets(value, reward, mask, 1.0, 0.0).tolist() == [[0.0, 0.25, -0.5, 1.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(problems(), st.floats(0, 1), st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_equals_the_definition_with_a_lambda_per_row(
    data: tuple[Tensor, Tensor, Tensor], gamma: float, lmbdas: list[float]
) -> None:
    value, reward, mask = data
    lmbda = torch.tensor(lmbdas, dtype=torch.float64)[: len(mask)]
    expected = oracle(value, reward, mask, gamma, lmbda)
    got = generalized_advantage(value, reward, mask, gamma, lmbda)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    target = value_targets(value, reward, mask, gamma, lmbda)
    torch.testing.assert_close(target, expected + value.where(mask, 0), rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(problems(), st.floats(0, 1), st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_equals_torchrl_for_a_scalar_lambda(data: tuple[Tensor, Tensor, Tensor], gamma: float, lmbda: float) -> None:
    value, reward, mask = data
    got = generalized_advantage(value, reward, mask, gamma, lmbda)
    targets = value_targets(value, reward, mask, gamma, lmbda)
    for b in range(len(mask)):
        if not mask[b].any():
            assert not got[b].any()
            continue
        v, r = value[b, mask[b]][:, None], reward[b, mask[b]][:, None]
        next_v = torch.cat([v[1:], v.new_full((1, 1), 7.0)])  # not read: the last token is terminal
        done = torch.zeros(v.shape, dtype=torch.bool)
        done[-1] = True
        factors = torch.tensor([gamma, lmbda], dtype=torch.float64)  # Python floats would pass through float32
        advantage, target = generalized_advantage_estimate(*factors, v, next_v, r, done, terminated=done)
        torch.testing.assert_close(got[b, mask[b]][:, None], advantage, rtol=0, atol=1e-10)
        torch.testing.assert_close(targets[b, mask[b]][:, None], target, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 10_000), st.data())
def test_padding_changes_nothing(lengths: list[int], seed: int, data: st.DataObject) -> None:
    """The same responses left-, right- and arbitrarily padded, NaN in the padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(2, n, generator=generator) for n in lengths]
    lmbda = length_adaptive_lambda(torch.tensor(lengths), 0.5)
    results = []
    for width in (9, 15):
        offsets = [data.draw(st.integers(0, width - n)) for n in lengths]
        value, reward = torch.full((2, len(lengths), width), NAN).unbind(0)
        mask = torch.zeros(value.shape, dtype=torch.bool)
        for b, (row, offset) in enumerate(zip(rows, offsets, strict=True)):
            window = slice(offset, offset + lengths[b])
            value[b, window], reward[b, window], mask[b, window] = row[0], row[1], True
        advantage = generalized_advantage(value, reward, mask, 0.99, lmbda)
        target = value_targets(value, reward, mask, 1.0, 1.0)
        assert not advantage[~mask].any() and not target[~mask].any()
        assert advantage.isfinite().all() and target.isfinite().all()
        results.append((advantage[mask], target[mask], whiten(advantage, mask)[mask]))
    assert all(torch.equal(a, b) for a, b in zip(results[0][:2], results[1][:2], strict=True))
    torch.testing.assert_close(results[0][2], results[1][2])


def test_lambda_one_target_is_the_reward_to_go_exactly() -> None:
    value, _, mask = problem([200], [3], 0, 210)
    reward = torch.zeros(1, 210)
    reward[0, 202] = -1.0
    target = value_targets(1e4 * value.float(), reward, mask, 1.0, 1.0)
    assert torch.equal(target, torch.where(mask, -1.0, 0.0))


def test_long_rows_in_float32() -> None:
    value, reward, mask = problem([5000, 4000], [0, 100], 1, 5000)
    lmbda = length_adaptive_lambda(mask.sum(1), 1.5)
    expected = oracle(value, reward, mask, 1.0, lmbda)
    got = generalized_advantage(value.float(), reward.float(), mask, 1.0, lmbda)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-4)


def test_next_value_bootstraps_where_the_end_is_not_terminal() -> None:
    value, reward = torch.tensor([[1.0, 2.0, 0.0]]), torch.zeros(1, 3)
    mask = torch.tensor([[True, True, False]])
    next_value = torch.tensor([[2.0, 5.0, NAN]])
    got = generalized_advantage(value, reward, mask, 1.0, 1.0, next_value)
    assert got.tolist() == [[4.0, 3.0, 0.0]]
    assert value_targets(value, reward, mask, 1.0, 0.0, next_value).tolist() == [[2.0, 5.0, 0.0]]


def test_errors_name_the_shapes() -> None:
    ok, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reward \[2, 4\]"):
        generalized_advantage(ok, torch.zeros(2, 4), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"lmbda \[3\]"):
        generalized_advantage(ok, ok, mask, 1.0, torch.ones(3))
    with pytest.raises(TypeError, match="boolean"):
        generalized_advantage(ok, ok, mask.long(), 1.0, 1.0)
    with pytest.raises(ValueError, match="lmbda must lie"):
        generalized_advantage(ok, ok, mask, 1.0, 1.5)
    with pytest.raises(ValueError, match="gamma must lie"):
        generalized_advantage(ok, ok, mask, -0.1, 1.0)


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
