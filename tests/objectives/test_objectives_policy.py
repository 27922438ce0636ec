"""The clipped surrogate, clip fractions and KL estimates, against numbers by hand and TorchRL."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives.llm import GRPOLoss

from vapo_async.objectives.policy import approx_kl, clipped_surrogate, clipped_tokens, kl_to_reference

torch.set_num_threads(1)
NAN, INF = float("nan"), float("inf")

# r: inside, above & A > 0, above & A < 0, below & A > 0, below & A < 0
RATIO = torch.tensor([1.1, 1.5, 1.5, 0.5, 0.5])
ADVANTAGE = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])


def test_clipped_surrogate_by_hand() -> None:
    log_ratio, constant = RATIO.log().requires_grad_(), ADVANTAGE.clone().requires_grad_()
    loss = clipped_surrogate(log_ratio, constant, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([-2.2, -2.56, 3.0, -1.0, 1.6]))
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-2.2, 0.0, 3.0, -1.0, 0.0]))
    assert constant.grad is None
    low, high = clipped_tokens(log_ratio, ADVANTAGE, 0.2, 0.28)
    assert low.tolist() == [False, False, False, False, True] and high.tolist() == [False, True, False, False, False]


def test_dual_clip_by_hand() -> None:
    # A < 0: the objective is at least c A, the loss at most -c A; c = 1.4: 2.8 instead of 3.0 at r = 1.5
    log_ratio = RATIO.log().requires_grad_()
    loss = clipped_surrogate(log_ratio, ADVANTAGE, 0.2, 0.28, 1.4)
    torch.testing.assert_close(loss, torch.tensor([-2.2, -2.56, 2.8, -1.0, 1.6]))
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-2.2, 0.0, 0.0, -1.0, 0.0]))
    low, high = clipped_tokens(log_ratio, ADVANTAGE, 0.2, 0.28, 1.4)
    assert low.tolist() == [False, False, False, False, True] and high.tolist() == [False, True, True, False, False]
    # out of reach, it changes nothing
    torch.testing.assert_close(clipped_surrogate(log_ratio, ADVANTAGE, 0.2, 0.28, 3.0)[2].item(), 3.0)


@pytest.mark.parametrize("dual_clip", [None, 1.4])
def test_clipped_tokens_are_those_without_gradient(dual_clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(2000, generator=generator).requires_grad_()
    advantage = torch.randn(2000, generator=generator)
    clipped_surrogate(log_ratio, advantage, 0.2, 0.28, dual_clip).sum().backward()
    low, high = clipped_tokens(log_ratio, advantage, 0.2, 0.28, dual_clip)
    assert log_ratio.grad is not None
    assert torch.equal(low | high, log_ratio.grad == 0)
    assert 0 < low.sum() < 1000 and 0 < high.sum() < 1000 and not (low & high).any()


def test_coefficients_may_be_scalar_tensors() -> None:
    expected = clipped_surrogate(RATIO.log(), ADVANTAGE, 0.2, 0.28, 1.4)
    low, high, dual = (torch.tensor(x) for x in (0.2, 0.28, 1.4))
    torch.testing.assert_close(clipped_surrogate(RATIO.log(), ADVANTAGE, low, high, dual), expected)
    torch.testing.assert_close(clipped_surrogate(RATIO.log(), ADVANTAGE, low, 0.28, dual), expected)
    torch.testing.assert_close(clipped_surrogate(RATIO.log(), ADVANTAGE, 0.2, high, 1.4), expected)
    double = clipped_surrogate(RATIO.log(), ADVANTAGE, low.double(), high.double(), dual.double())
    assert double.dtype is torch.float32


@pytest.mark.parametrize(
    ("low", "high", "dual", "message"),
    [
        (1.0, 0.2, None, "expected 0 <= clip_low < 1 and clip_high >= 0, got 1.0 and 0.2"),
        (-0.1, 0.2, None, "got -0.1 and 0.2"),
        (0.2, -0.1, None, "got 0.2 and -0.1"),
        (NAN, 0.2, None, "got nan and 0.2"),
        (0.2, 0.2, 1.0, "dual_clip must be above 1, got 1.0"),
    ],
)
def test_coefficients_out_of_range(low: float, high: float, dual: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(RATIO.log(), ADVANTAGE, low, high, dual)
    with pytest.raises(ValueError, match=message):
        clipped_tokens(RATIO.log(), ADVANTAGE, low, high, dual)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_ratio_that_overflows_gives_finite_gradients(dual_clip: float | None) -> None:
    log_ratio = torch.tensor([200.0, 200.0, -200.0, INF, -INF], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss = clipped_surrogate(log_ratio, advantage, 0.2, 0.28, dual_clip)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_ratio.grad is not None and log_ratio.grad.isfinite().all()


def test_approx_kl_is_k3_and_unbiased() -> None:
    log_ratio = torch.tensor([0.0, 2.0, 0.5]).clamp_min(1e-3).log()
    torch.testing.assert_close(approx_kl(log_ratio), log_ratio.exp() - 1 - log_ratio)
    p, q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close((q * approx_kl((p / q).log())).sum(), (q * (q / p).log()).sum())
    assert not approx_kl(log_ratio.requires_grad_()).requires_grad


def test_kl_to_reference_by_hand() -> None:
    # ref / theta = 0.5, 1, 2: x - log x - 1 = 0.5 + 0.6931 - 1, 0, 2 - 0.6931 - 1; gradients 1 - x
    theta = torch.tensor([0.4, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64).log().requires_grad_()
    kl = kl_to_reference(theta, ref)
    torch.testing.assert_close(kl, torch.tensor([0.1931471806, 0.0, 0.3068528194], dtype=torch.float64))
    kl.sum().backward()
    torch.testing.assert_close(theta.grad, torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64))
    assert ref.grad is None
    with pytest.raises(ValueError, match=r"ref_log_prob \[2\]"):
        kl_to_reference(theta, ref[:2])


def test_kl_to_reference_is_that_of_torchrl() -> None:
    generator = torch.Generator().manual_seed(0)
    theta, ref = (torch.randn(4, 9, generator=generator, dtype=torch.float64) - 2 for _ in range(2))
    ours, theirs = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    data = TensorDict({"_cur_log_prob": theirs}, batch_size=[4])
    loss, kl = GRPOLoss._kl_to_ref(SimpleNamespace(), data, ref_log_prob=ref, coeff=0.1)
    expected = 0.1 * kl_to_reference(ours, ref).mean()
    torch.testing.assert_close(expected, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(expected, ours), torch.autograd.grad(loss, theirs), rtol=1e-12, atol=1e-15
    )
    assert kl > 0


def test_kl_to_reference_far_away() -> None:
    """A token that the reference finds impossible still pulls with gradient 1; the other way nothing overflows."""
    theta = torch.tensor([0.0, -500.0], requires_grad=True)
    kl = kl_to_reference(theta, torch.tensor([-500.0, 0.0]))
    kl.sum().backward()
    assert kl[0].item() == 499.0 and kl[1].isfinite()
    assert theta.grad is not None and theta.grad.tolist() == [1.0, 0.0]
