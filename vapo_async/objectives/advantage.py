"""Advantages and value targets over the tokens of responses: pure functions of tensors.

B rows, T steps. ``mask`` [B, T] says which steps are actions (trained tokens): they may start and stop anywhere, with
padding on either side and holes in between, where an environment wrote. V(s_t) is read before action t. What stands
outside the mask, NaN included, is never read, and every result is 0 there.

A row is one trajectory, or several one after another: then ``ends`` [B, T] bool is True on the last step of each
(TorchRL's ``done``), and nothing flows back across it.

All sums run in float64, whatever the input: over tens of thousands of tokens a λ rounded to float32 alone would move
them by 1e-3. Results are float32, float64 if an input is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vapo_async.objectives.checks import (
    check_above,
    check_boolean,
    check_mask,
    check_rows,
    check_same_shape,
    describe,
    result_dtype,
)
from vapo_async.objectives.recursion import advantages_on_cpu, returns_on_cpu
from vapo_async.objectives.scan import ActionScan


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ_policy = clamp(1 − 1/(α·l), 0, 1) per trajectory, so that Σ_t λ^t ≈ α·l (VAPO, arXiv 2504.05118).

    Args:
        lengths: any shape, trained tokens of each trajectory, the end token included.
        alpha: α > 0. Every trajectory of l ≤ 1/α tokens gets λ = 0.

    Returns:
        float64 of the shape of ``lengths``.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return (1 - 1 / (alpha * lengths.double())).clamp(0.0, 1.0)


def trajectory_lengths(mask: Tensor, ends: Tensor | None = None) -> Tensor:
    """How many masked tokens the trajectory has that each token belongs to.

    Args: mask, ends: [B, T] bool, see the module. Returns: [B, T] int64, 0 outside the mask.
    """
    _check_masks(mask, ends)
    if ends is None or not mask.numel():
        return mask.sum(1, keepdim=True) * mask
    starts = pad(ends[:, :-1], (1, 0))
    starts[:, 0] = True
    trajectory = starts.flatten().cumsum(0) - 1
    count = torch.zeros_like(trajectory).index_add(0, trajectory, mask.flatten().long())
    return count[trajectory].reshape(mask.shape) * mask


def generalized_advantage(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lmbda: float | Tensor,
    next_value: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Â_t = δ_t + γλ Â_{t+1}, δ_t = r_t + γ V(s_{t+1}) − V(s_t), V = Â = 0 after the end (GAE, arXiv 1506.02438).

    Args:
        value: [B, T], V(s_t).
        reward: [B, T].
        mask: [B, T] bool, the actions.
        gamma: discount in [0, 1].
        lmbda: λ in [0, 1]: one number; one per row, [B] (also where B = T) or [B, 1]; or one per step, [B, T].
        next_value: [B, T], V(s_{t+1}), where it is not the next action's value, or where the end of a trajectory is not
            terminal. None = the value of the next action of the trajectory, 0 after the last one.
        ends: [B, T] bool, the last step of each trajectory; None = a row is one trajectory.

    Returns:
        [B, T], 0 outside the mask; differentiable in value, reward and next_value.
    """

    p = _checked(gamma, value, reward, mask, lmbda, next_value, ends)
    if p.compiled:
        return advantages_on_cpu(p.value, p.reward, mask, p.lmbda, p.next_value, ends, gamma)
    scan = ActionScan(mask, ends)
    delta = p.reward.double() + gamma * p.next_values(scan) - p.value.double()
    return p.result(scan.sums(delta, gamma * p.lmbda))


def value_targets(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lmbda: float | Tensor,
    next_value: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """The λ-return G_t = Â_t + V(s_t), usually with the critic's own λ (decoupled GAE, VC-PPO, arXiv 2503.01491).

    Computed by its own recursion, G_t = r_t + γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}), so that λ = γ = 1 gives the
    reward-to-go without a rounding error from V. Arguments and result as :func:`generalized_advantage`.
    """

    p = _checked(gamma, value, reward, mask, lmbda, next_value, ends)
    if p.compiled:
        return returns_on_cpu(p.value, p.reward, mask, p.lmbda, p.next_value, ends, gamma)
    scan = ActionScan(mask, ends)
    bootstrap = p.next_values(scan) - p.lmbda * scan.following(p.value)
    return p.result(scan.sums(p.reward.double() + gamma * bootstrap, gamma * p.lmbda))


def vtrace_targets(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lmbda: float | Tensor,
    log_ratio: Tensor,
    rho_cap: float,
    c_cap: float,
    next_value: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """V-trace: the value target, corrected for a policy that has moved on (IMPALA, arXiv 1802.01561, eq. 1).

    v_s = V(s_s) + Σ_{t≥s} γ^{t−s} (Π_{s≤i<t} c_i) ρ_t δ_t with ρ_t = min(rho_cap, e^{log_ratio_t}) and
    c_i = λ min(c_cap, e^{log_ratio_i}). At log_ratio = 0 and caps ≥ 1 it is the λ-return of :func:`value_targets`.

    Args:
        log_ratio: [B, T], log π(a_t) − log μ(a_t) of the policy now and the one that acted; taken as a constant.
        rho_cap: ρ̄ > 0, decides whose value the target is.
        c_cap: c̄ > 0, decides how far corrections reach back.

    The others, and the result, as :func:`generalized_advantage`.
    """
    check_above(0, rho_cap=rho_cap, c_cap=c_cap)

    p = _checked(gamma, value, reward, mask, lmbda, next_value, ends, log_ratio=log_ratio)
    log_ratio = log_ratio.detach().to(p.value.dtype)
    if p.compiled:
        arguments = p.value, p.reward, mask, p.lmbda, p.next_value, ends, gamma, log_ratio, rho_cap, c_cap
        return torch.where(mask, p.value, 0.0) + advantages_on_cpu(*arguments)
    scan = ActionScan(mask, ends)
    ratio = torch.where(mask, log_ratio, 0.0).double().exp()
    delta = p.reward.double() + gamma * p.next_values(scan) - p.value.double()
    sums = scan.sums(ratio.clamp_max(rho_cap) * delta, gamma * p.lmbda * ratio.clamp_max(c_cap))
    return p.result(p.value + sums)


def group_advantage(rewards: Tensor, group_ids: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Â_{i,t} = (R_i − mean(R)) / (std(R) + ε) over the responses of one group (GRPO, arXiv 2402.03300).

    The standard deviation is the unbiased one (divisor G − 1), as in TRL, verl and TorchRL. A group whose rewards are
    all equal, or of a single response, gets exactly 0.

    Args:
        rewards: [N], one reward per response.
        group_ids: [N] int, equal for responses to one prompt; in any order.
        mask: [N, T] bool.

    Returns:
        [N, T], the response's advantage on each of its tokens, 0 outside the mask.
    """
    check_mask(mask)
    if mask.ndim != 2:
        raise ValueError(f"expected mask of shape [N, T], got {describe(mask=mask)}")
    check_rows(mask.shape[0], rewards=rewards, group_ids=group_ids)
    r = rewards.double()
    unique, group = torch.unique(group_ids, return_inverse=True)
    zeros = r.new_zeros(len(unique))
    count = zeros.index_add(0, group, torch.ones_like(r))
    centred = r - (zeros.index_add(0, group, r) / count)[group]
    std = (zeros.index_add(0, group, centred.square()) / (count - 1).clamp_min(1)).sqrt()
    spread = zeros.scatter_reduce(0, group, r, "amax", include_self=False) > zeros.scatter_reduce(
        0, group, r, "amin", include_self=False
    )
    advantage = torch.where(spread[group], centred / (std[group] + eps), 0.0)
    return torch.where(mask, advantage[:, None], 0.0).to(result_dtype(rewards))


@dataclass(frozen=True)
class _Problem:
    """Checked arguments in the result's dtype; ``lmbda`` is float64, [B, 1] or [B, T]."""

    value: Tensor
    reward: Tensor
    mask: Tensor
    lmbda: Tensor
    next_value: Tensor | None
    compiled: bool
    """On a CPU and without gradient: the loops of :mod:`vapo_async.objectives.recursion`; else torch's operations."""

    def next_values(self, scan: ActionScan) -> Tensor:
        """V(s_{t+1}), [B, T] float64."""
        return scan.following(self.value) if self.next_value is None else self.next_value.double()

    def result(self, sums: Tensor) -> Tensor:
        return torch.where(self.mask, sums, 0.0).to(self.value.dtype)


def _checked(
    gamma: float,
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    lmbda: float | Tensor,
    next_value: Tensor | None,
    ends: Tensor | None,
    **others: Tensor,
) -> _Problem:
    read = {"value": value, "reward": reward} | ({} if next_value is None else {"next_value": next_value})
    check_same_shape(2, **read, **others, mask=mask)
    _check_masks(mask, ends)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    dtype = result_dtype(*read.values(), *others.values())
    value, reward, *rest = (x.to(dtype) for x in read.values())
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in read.values())
    return _Problem(
        value=value,
        reward=reward,
        mask=mask,
        lmbda=_checked_lambda(lmbda, value, mask),
        next_value=rest[0] if rest else None,
        compiled=mask.device.type == "cpu" and not differentiated,
    )


def _check_masks(mask: Tensor, ends: Tensor | None) -> None:
    check_mask(mask)
    check_same_shape(2, mask=mask)
    if ends is not None:
        check_boolean(ends=ends)
        check_same_shape(mask=mask, ends=ends)


def _checked_lambda(lmbda: float | Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """λ as float64 [B, 1] or [B, T] on the device of ``value`` [B, T]; per step it is not read outside the mask."""
    lam = torch.as_tensor(lmbda, dtype=torch.float64, device=value.device).detach()
    rows, steps = value.shape
    if tuple(lam.shape) not in {(), (rows,), (rows, 1), (rows, steps)}:
        raise ValueError(f"expected one lmbda, or lmbda [B], [B, 1] or [B, T], got {describe(lmbda=lam, value=value)}")
    if lam.shape == mask.shape:
        lam = torch.where(mask, lam, 0.0)
    if bool((wrong := ~((lam >= 0) & (lam <= 1))).any()):
        raise ValueError(f"lmbda must lie in [0, 1], got {float(lam[wrong][0])}")
    return lam if lam.ndim == 2 else lam.reshape(-1, 1).expand(rows, 1)
