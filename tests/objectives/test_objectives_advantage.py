"""Advantages and value targets against hand-computed numbers and TorchRL's own recursions in fp64."""

from collections.abc import Callable

import pytest
import torch
from advantage_problems import GAMMA, LONG, NAN, SHORT, Problem, bits, problems, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vapo_async.objectives.advantage import (
    generalized_advantage,
    length_adaptive_lambda,
    trajectory_lengths,
    value_targets,
    vtrace_targets,
)
from vapo_async.objectives.statistics import whiten

torch.set_num_threads(1)


def check_against_torchrl(p: Problem, gamma: float, bootstrap: bool, cut: bool) -> None:
    """Both the compiled loops and torch's operations, which are used where a gradient is wanted."""
    optional = p.optional(bootstrap, cut)
    advantage, target = p.torchrl(gamma, p.lmbda, bootstrap=bootstrap, cut=cut)
    _, corrected = p.torchrl(gamma, p.lmbda, bootstrap=bootstrap, cut=cut, vtrace=True)
    per_step = p.lmbda.expand(p.mask.shape)
    for value in (p.value, p.value.clone().requires_grad_()):
        given = value, p.reward, p.mask, gamma
        found = [
            generalized_advantage(*given, p.lmbda, **optional),
            generalized_advantage(*given, per_step, **optional),
            value_targets(*given, p.lmbda[:, 0], **optional),
            vtrace_targets(*given, 1.0, p.log_ratio, 1.2, 0.9, **optional),
        ]
        assert all(x.requires_grad == value.requires_grad for x in found)
        for x, expected in zip(found, (advantage, advantage, target, corrected), strict=True):
            same(x.detach(), expected)


@settings(max_examples=80, deadline=None)
@given(problems(SHORT), GAMMA, st.booleans(), st.booleans())
def test_equals_torchrl(p: Problem, gamma: float, bootstrap: bool, cut: bool) -> None:
    check_against_torchrl(p, gamma, bootstrap, cut)


@settings(max_examples=6, deadline=None)
@given(problems(LONG), st.sampled_from([0.99, 1.0]), st.booleans(), st.booleans())
def test_equals_torchrl_on_long_rows(p: Problem, gamma: float, bootstrap: bool, cut: bool) -> None:
    check_against_torchrl(p, gamma, bootstrap, cut)


@settings(max_examples=40, deadline=None)
@given(problems(SHORT), GAMMA, st.booleans(), st.booleans())
def test_a_lambda_per_step_is_that_of_the_step(p: Problem, gamma: float, bootstrap: bool, cut: bool) -> None:
    """Against the definition, token by token."""
    expected = torch.zeros(p.mask.shape, dtype=torch.float64)
    for b in range(len(p.mask)):
        later_value = later = 0.0
        for t in p.mask[b].nonzero().flatten().flip(0).tolist():
            if cut and p.ends[b, t]:
                later_value = later = 0.0
            v_next = float(p.next_value[b, t]) if bootstrap else later_value
            delta = float(p.reward[b, t]) + gamma * v_next - float(p.value[b, t])
            later = delta + gamma * float(p.step_lmbda[b, t]) * later
            later_value, expected[b, t] = float(p.value[b, t]), later
    optional = p.optional(bootstrap, cut)
    same(generalized_advantage(p.value, p.reward, p.mask, gamma, p.step_lmbda, **optional), expected)
    target = expected + p.value.where(p.mask, 0)
    same(value_targets(p.value, p.reward, p.mask, gamma, p.step_lmbda, **optional), target)


@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize("cuts", [0.0, 0.2])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gradients(holes: float, cuts: float, bootstrap: bool) -> None:
    p = Problem(2, 12, holes=holes, cuts=cuts, seed=4)
    inside = p.mask.nonzero(as_tuple=True)
    given = [p.value, p.reward] + ([p.next_value] if bootstrap else [])
    at_actions = [x[inside].requires_grad_() for x in given]

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def apply(*leaves: Tensor) -> Tensor:
            filled = [x.index_put(inside, leaf) for x, leaf in zip(given, leaves, strict=True)]
            v, r, *rest = filled
            return function(v, r, p.mask, 0.9, p.lmbda, *(rest or [None]), p.ends)

        return apply

    def vtrace(v: Tensor, r: Tensor, m: Tensor, g: float, lam: Tensor, nv: Tensor | None, e: Tensor) -> Tensor:
        return vtrace_targets(v, r, m, g, lam, p.log_ratio, 1.0, 1.0, nv, e)

    for function in (generalized_advantage, value_targets, vtrace):
        assert torch.autograd.gradcheck(of(function), at_actions)
        assert torch.autograd.gradgradcheck(of(function), at_actions)
        with torch.no_grad():  # the other way through the code: the compiled loops
            plain = of(function)(*at_actions)
        torch.testing.assert_close(of(function)(*at_actions).detach(), plain, rtol=1e-12, atol=1e-12)


def test_no_gradient_leaves_the_mask_or_becomes_nan() -> None:
    p = Problem(3, 30, holes=0.2, cuts=0.1, seed=1)
    value, reward = p.value.clone().requires_grad_(), p.reward.clone().requires_grad_()
    generalized_advantage(value, reward, p.mask, 0.9, p.lmbda).sum().backward()
    for leaf in (value, reward):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and not leaf.grad[~p.mask].any()


@settings(max_examples=40, deadline=None)
@given(problems(SHORT))
def test_packed_trajectories_equal_separate_rows(p: Problem) -> None:
    """Lengths, and with them λ, advantages and targets, of each trajectory cut out by itself."""
    lengths = trajectory_lengths(p.mask, p.ends)
    lmbda = length_adaptive_lambda(lengths, 0.2)
    packed = generalized_advantage(p.value, p.reward, p.mask, 0.9, lmbda, ends=p.ends)
    for b in range(len(p.mask)):
        cuts = (p.ends[b].nonzero().flatten() + 1).tolist()
        for start, stop in zip([0, *cuts], [*cuts, p.mask.shape[1]], strict=True):
            v, r, m = (x[b : b + 1, start:stop] for x in (p.value, p.reward, p.mask))
            assert torch.equal(lengths[b : b + 1, start:stop], m.sum() * m)
            alone = generalized_advantage(v, r, m, 0.9, length_adaptive_lambda(m.sum(1), 0.2))
            same(packed[b : b + 1, start:stop], alone)


def test_three_tokens_by_hand() -> None:
    # prompt, three tokens, padding; V = 0.5, 0.25, -0.5; R = 1 at the end; gamma 0.5, lambda 0.5
    value = torch.tensor([[NAN, 0.5, 0.25, -0.5, NAN]])
    reward = torch.tensor([[NAN, 0.0, 0.0, 1.0, NAN]])
    mask = bits("01110")
    # deltas: 0.125-0.5=-0.375, -0.25-0.25=-0.5, 1+0.5=1.5; factor 0.25
    expected = [0.0, -0.375 + 0.25 * (-0.5 + 0.25 * 1.5), -0.5 + 0.25 * 1.5, 1.5, 0.0]
    assert generalized_advantage(value, reward, mask, 0.5, 0.5).tolist() == [expected]
    assert value_targets(value, reward, mask, 1.0, 1.0).tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    assert value_targets(value, reward, mask, 1.0, 0.0).tolist() == [[0.0, 0.25, -0.5, 1.0, 0.0]]
    # the same with environment tokens in between
    holes = bits("1010010")
    spread = [torch.full((1, 7), NAN).masked_scatter(holes, x[mask]) for x in (value, reward)]
    got = generalized_advantage(*spread, holes, 0.5, 0.5)
    assert got.tolist() == [[expected[1], 0.0, expected[2], 0.0, 0.0, expected[3], 0.0]]


def test_vtrace_by_hand() -> None:
    value, reward = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.0, 8.0]])
    log_ratio = torch.tensor([[0.5, 2.0, 4.0]]).log()
    # deltas 0.5*2-1=0, 0.5*4-2=0, 8-4=4; rho 0.5, 1.5, 1.5; c = 0.5 * (0.5, 1, 1) = 0.25, 0.5
    # D_3 = 6, D_2 = 0.5*0.5*6 = 1.5, D_1 = 0.5*0.25*1.5 = 0.1875
    got = vtrace_targets(value, reward, bits("111"), 0.5, 0.5, log_ratio, rho_cap=1.5, c_cap=1.0)
    torch.testing.assert_close(got, torch.tensor([[1.1875, 3.5, 10.0]]))


def test_vtrace_takes_the_ratio_as_a_constant() -> None:
    x = torch.ones(1, 3)
    log_ratio = torch.zeros(1, 3, requires_grad=True)
    assert not vtrace_targets(x, x, bits("111"), 1.0, 1.0, log_ratio, 2.0, 2.0).requires_grad


@settings(max_examples=40, deadline=None)
@given(problems(SHORT), GAMMA, st.booleans(), st.booleans())
def test_vtrace_without_lag_is_the_lambda_return(p: Problem, gamma: float, bootstrap: bool, cut: bool) -> None:
    optional, no_lag = p.optional(bootstrap, cut), torch.where(p.mask, 0.0, NAN)
    got = vtrace_targets(p.value, p.reward, p.mask, gamma, p.lmbda, no_lag, 1.0, 1.0, **optional)
    same(got, value_targets(p.value, p.reward, p.mask, gamma, p.lmbda, **optional))


@pytest.mark.parametrize(("rho_cap", "c_cap"), [(0.0, 1.0), (1.0, -1.0), (NAN, 1.0)])
def test_vtrace_refuses_caps(rho_cap: float, c_cap: float) -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="_cap must be positive"):
        vtrace_targets(x, x, bits("11"), 1.0, 1.0, x, rho_cap, c_cap)


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
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_lambda_one_target_is_the_reward_to_go_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    value = 1e4 * torch.randn(1, 210, generator=generator, dtype=torch.float64)
    reward, mask = torch.zeros(1, 210).double(), torch.zeros(1, 210, dtype=torch.bool)
    mask[0, 3:203] = True
    reward[0, 202] = -0.7
    next_value = torch.cat([value[:, 1:203], value.new_zeros(1, 8)], 1)
    for v, r, v_next in ((value, reward, next_value), (value.float(), reward.float(), next_value.float())):
        expected = torch.where(mask, r[0, 202], 0.0)
        assert torch.equal(value_targets(v, r, mask, 1.0, 1.0), expected)
        assert torch.equal(value_targets(v, r, mask, 1.0, 1.0, v_next), expected.where(mask, 0.0))
        mask_with_holes = mask.clone()
        mask_with_holes[0, 50:60] = False
        assert torch.equal(value_targets(v, r, mask_with_holes, 1.0, 1.0), expected.where(mask_with_holes, 0.0))


def test_lambda_zero_is_the_one_step_error_exactly() -> None:
    value, reward = torch.tensor([[1.5, 0.25, 3.0]]), torch.tensor([[0.5, 0.125, 1.0]])
    assert generalized_advantage(value, reward, bits("111"), 1.0, 0.0).tolist() == [[-0.75, 2.875, -2.0]]
    assert generalized_advantage(value, reward, bits("111"), 0.0, 1.0).tolist() == [[-1.0, -0.125, -2.0]]


@pytest.mark.parametrize("function", [generalized_advantage, value_targets])
def test_32768_tokens_in_float32(function: Callable[..., Tensor]) -> None:
    """To 1e-5 of the fp64 recursion, with a λ of 0.9994 and with λ = 1 − 1e-6."""
    steps = 32768
    generator = torch.Generator().manual_seed(0)
    value, reward = torch.randn(2, 3, steps, generator=generator)
    mask = torch.ones(3, steps, dtype=torch.bool)
    mask[1, 20000:] = False
    lmbda = length_adaptive_lambda(mask.sum(1), 0.05)
    lmbda[2] = 1 - 1e-6
    for gamma in (1.0, 0.9999):
        v, r = value.double().where(mask, 0), reward.double().where(mask, 0)
        expected, later, v_next = torch.zeros(3, steps).double(), torch.zeros(3).double(), torch.zeros(3).double()
        for t in reversed(range(steps)):
            later = torch.where(mask[:, t], r[:, t] + gamma * v_next - v[:, t] + gamma * lmbda * later, 0.0)
            v_next, expected[:, t] = v[:, t], later
        expected = expected + v if function is value_targets else expected
        got = function(value, reward, mask, gamma, lmbda)
        assert got.dtype == torch.float32
        error = (got - expected).abs().amax(1) / expected.abs().amax(1)
        assert error.max() < 1e-6, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    p = Problem(3, 40, holes=0.1, cuts=0.1, seed=3)
    value, reward, next_value, log_ratio = (x.to(dtype) for x in (p.value, p.reward, p.next_value, p.log_ratio))
    wide = [x.double() for x in (value, reward, next_value, log_ratio)]
    out = torch.float64 if dtype == torch.float64 else torch.float32
    for function in (generalized_advantage, value_targets):
        got = function(value, reward, p.mask, 0.9, p.lmbda, next_value, p.ends)
        assert got.dtype == out
        assert torch.equal(got, function(*wide[:2], p.mask, 0.9, p.lmbda, wide[2], p.ends).to(out))
    got = vtrace_targets(value, reward, p.mask, 0.9, p.lmbda, log_ratio, 1.0, 1.0, next_value, p.ends)
    assert got.dtype == out
    mixed = generalized_advantage(value, reward, p.mask, 0.9, p.lmbda, p.next_value)
    assert mixed.dtype == torch.float64


def test_one_lambda_per_row_even_where_the_batch_is_as_long_as_a_row() -> None:
    x = torch.randn(5, 5, dtype=torch.float64)
    mask, lmbda = torch.ones(5, 5, dtype=torch.bool), torch.linspace(0, 1, 5).double()
    got = generalized_advantage(x, x, mask, 1.0, lmbda)
    for other in (lmbda[:, None], lmbda[:, None].expand(5, 5)):
        assert torch.equal(got, generalized_advantage(x, x, mask, 1.0, other))
    for b in range(5):
        assert torch.equal(
            got[b : b + 1], generalized_advantage(x[b : b + 1], x[b : b + 1], mask[:1], 1.0, float(lmbda[b]))
        )
    assert not torch.allclose(got, generalized_advantage(x, x, mask, 1.0, lmbda.expand(5, 5)))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    x, mask = torch.full(shape, NAN), torch.zeros(shape, dtype=torch.bool)
    for got in (
        generalized_advantage(x, x, mask, 1.0, 1.0, ends=mask),
        value_targets(x, x, mask, 1.0, torch.ones(shape[0])),
        vtrace_targets(x, x, mask, 1.0, 1.0, x, 1.0, 1.0, x),
    ):
        assert torch.equal(got, torch.zeros(shape))


def test_ends_outside_the_mask_cut_too() -> None:
    value, reward = torch.zeros(1, 5), torch.ones(1, 5)
    assert generalized_advantage(value, reward, bits("11011"), 1.0, 1.0).tolist() == [[4, 3, 0, 2, 1]]
    got = generalized_advantage(value, reward, bits("11011"), 1.0, 1.0, ends=bits("00100"))
    assert got.tolist() == [[2, 1, 0, 2, 1]]
    assert trajectory_lengths(bits("11011"), bits("00100")).tolist() == [[2, 2, 0, 2, 2]]


def test_next_value_bootstraps_where_the_end_is_not_terminal() -> None:
    value, reward = torch.tensor([[1.0, 2.0, 0.0]]), torch.zeros(1, 3)
    next_value = torch.tensor([[2.0, 5.0, NAN]])
    got = generalized_advantage(value, reward, bits("110"), 1.0, 1.0, next_value)
    assert got.tolist() == [[4.0, 3.0, 0.0]]
    assert value_targets(value, reward, bits("110"), 1.0, 0.0, next_value).tolist() == [[2.0, 5.0, 0.0]]


@pytest.mark.parametrize("differentiated", [False, True])
def test_inputs_are_left_alone_and_rows_do_not_meet(differentiated: bool) -> None:
    p = Problem(9, 700, holes=0.0, cuts=0.0, seed=5)
    value = p.value.clone().requires_grad_(differentiated)
    arguments = p.value, p.reward, p.mask, p.lmbda, p.next_value
    kept = [x.clone() for x in arguments]
    got = generalized_advantage(value, p.reward, p.mask, 0.99, p.lmbda, p.next_value)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(arguments, kept, strict=True))
    for b in (0, 1, 8):
        row = slice(b, b + 1)
        one = generalized_advantage(value[row], p.reward[row], p.mask[row], 0.99, p.lmbda[row], p.next_value[row])
        assert torch.equal(got[row], one)


def test_views_of_any_layout_are_read_right() -> None:
    """[T, B] transposed, and every other column of a wider tensor."""
    p = Problem(4, 50, holes=0.2, cuts=0.1, seed=6)
    expected = generalized_advantage(p.value, p.reward, p.mask, 0.9, p.lmbda, p.next_value, p.ends)
    turned = [x.t().contiguous().t() for x in (p.value, p.reward, p.mask)]
    wide = [x.repeat_interleave(2, 1)[:, ::2] for x in (p.next_value, p.ends)]
    assert torch.equal(generalized_advantage(*turned, 0.9, p.lmbda, *wide), expected)


def test_errors_name_the_shapes() -> None:
    ok, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"value \[2, 3\], reward \[2, 4\]"):
        generalized_advantage(ok, torch.zeros(2, 4), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"value \[2, 3\].* next_value \[2, 2\]"):
        value_targets(ok, ok, mask, 1.0, 1.0, next_value=ok[:, :2])
    with pytest.raises(ValueError, match=r"value \[2, 3\].* log_ratio \[2\]"):
        vtrace_targets(ok, ok, mask, 1.0, 1.0, torch.zeros(2), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"mask \[2, 3\], ends \[2, 2\]"):
        generalized_advantage(ok, ok, mask, 1.0, 1.0, ends=mask[:, :2])
    for wrong in (torch.ones(3), torch.ones(1, 3), torch.ones(3, 1), torch.ones(2, 3, 1), torch.ones(1, 1)):
        with pytest.raises(ValueError) as error:
            generalized_advantage(ok, ok, mask, 1.0, wrong)
        assert f"lmbda {list(wrong.shape)}, value [2, 3]" in str(error.value)
    with pytest.raises(ValueError, match=r"2 dimensions, got mask \[3\]"):
        trajectory_lengths(mask[0])
    with pytest.raises(ValueError, match=r"2 dimensions, got value \[2, 3, 1\]"):
        generalized_advantage(ok[..., None], ok[..., None], mask[..., None], 1.0, 1.0)
    with pytest.raises(TypeError, match="boolean"):
        generalized_advantage(ok, ok, mask.long(), 1.0, 1.0)
    with pytest.raises(TypeError, match="ends"):
        generalized_advantage(ok, ok, mask, 1.0, 1.0, ends=ok)


@pytest.mark.parametrize("lmbda", [1.5, -0.1, NAN, torch.tensor([0.5, 1.5])])
def test_lambda_must_lie_in_0_1(lmbda: float | Tensor) -> None:
    ok, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lmbda must lie in \[0, 1\], got (1.5|-0.1|nan)"):
        value_targets(ok, ok, mask, 1.0, lmbda)
    with pytest.raises(ValueError, match="gamma must lie"):
        generalized_advantage(ok, ok, mask, -0.1, 1.0)
    with pytest.raises(ValueError, match="gamma must lie"):
        generalized_advantage(ok, ok, mask, NAN, 1.0)
