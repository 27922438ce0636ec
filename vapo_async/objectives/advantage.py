"""Advantages and value targets over the tokens of responses: pure functions of tensors.

B rows, T tokens. Each row holds one response: the tokens under ``mask``, wherever the padding and the prompt lie.
Only they are actions; V(s_t) is read before action t, and V after the last action is 0. What stands outside the mask,
NaN included, is never read, and every result is 0 there. Arithmetic and results are float32, float64 if an input is.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vapo_async.objectives.checks import check_mask, check_rows, check_same_shape, describe


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """λ_policy = clamp(1 − 1/(α·l), 0, 1) per response, so that Σ_t λ^t ≈ α·l (VAPO, arXiv 2504.05118).

    Args:
        lengths: [B], trained tokens of each response, the end token included.
        alpha: α > 0. Every response of l ≤ 1/α tokens gets λ = 0.

    Returns:
        [B] float64: at tens of thousands of tokens float32 would already move λ^l.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if lengths.ndim != 1:
        raise ValueError(f"expected lengths of shape [B], got {describe(lengths=lengths)}")
    return (1 - 1 / (alpha * lengths.double())).clamp(0.0, 1.0)


def generalized_advantage(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lmbda: float | Tensor,
    next_value: Tensor | None = None,
) -> Tensor:
    """Â_t = δ_t + γλ Â_{t+1}, δ_t = r_t + γ V(s_{t+1}) − V(s_t), V = Â = 0 after the end (GAE, arXiv 1506.02438).

    Args:
        value: [B, T], V(s_t).
        reward: [B, T].
        mask: [B, T] bool, the tokens of the response.
        gamma: discount in [0, 1].
        lmbda: λ in [0, 1], one for all rows or one per row, [B].
        next_value: [B, T], V(s_{t+1}), where it is not the next token's value, or where the end of a response is not
            terminal. None = the value of the row's next action, 0 after the last one.

    Returns:
        [B, T], 0 outside the mask; differentiable in value and reward.
    """
    (v, r, v_next), place = _compact(value, reward, mask, next_value)
    return _expand(_discounted_sum(r + gamma * v_next - v, gamma, lmbda), mask, place)


def value_targets(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lmbda_critic: float | Tensor,
    next_value: Tensor | None = None,
) -> Tensor:
    """The λ-return G_t = Â_t^{λ_critic} + V(s_t), with the critic's own λ (decoupled GAE, VC-PPO, arXiv 2503.01491).

    Computed by its own recursion, G_t = r_t + γ ((1 − λ) V(s_{t+1}) + λ G_{t+1}), so that λ = γ = 1 gives the
    reward-to-go without a rounding error from V. Arguments and result as :func:`generalized_advantage`.
    """
    (v, r, v_next), place = _compact(value, reward, mask, next_value)
    step = r + gamma * (v_next - _row_lambda(lmbda_critic, r).to(r.dtype) * _shift(v, 1))
    return _expand(_discounted_sum(step, gamma, lmbda_critic), mask, place)


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
    return torch.where(mask, advantage[:, None], 0.0).to(_result_dtype(rewards))


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(var + ε) over the masked entries, var unbiased; 0 outside the mask. Shapes [B, T]."""
    check_same_shape(x=x, mask=mask)
    check_mask(mask)
    kept = torch.where(mask, x, 0.0).to(_result_dtype(x))
    count = mask.sum()
    centred = torch.where(mask, kept - kept.sum() / count.clamp_min(1), 0.0)
    return centred * (centred.square().sum() / (count - 1).clamp_min(1) + eps).rsqrt()


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the masked entries; 0 where all targets are equal, since nothing can be explained.

    Args: value, target, mask: [B, T]. Returns: scalar float64, at most 1, negative for a critic worse than a constant.
    """
    check_same_shape(value=value, target=target, mask=mask)
    check_mask(mask)
    r, v = target[mask].double(), value[mask].double()
    if r.numel() == 0 or bool(r.max() == r.min()):
        return r.new_zeros(())
    return 1 - (r - v).var(correction=0) / r.var(correction=0)


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _compact(
    value: Tensor, reward: Tensor, mask: Tensor, next_value: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value, reward and next value with each row's masked entries moved to its left, and where each one went.

    Shapes [B, longest response], zeros after the end.
    """
    check_same_shape(2, value=value, reward=reward, mask=mask)
    check_mask(mask)
    longest = int(mask.sum(1).max()) if mask.numel() else 0
    zeros = torch.zeros(mask.shape[0], longest, dtype=_result_dtype(value, reward), device=value.device)
    place = (mask.nonzero()[:, 0], (mask.cumsum(1) - 1)[mask])
    v, r = (zeros.index_put(place, x[mask].to(zeros)) for x in (value, reward))
    if next_value is None:
        return (v, r, _shift(v, 1)), place
    check_same_shape(value=value, next_value=next_value)
    return (v, r, zeros.index_put(place, next_value[mask].to(zeros))), place


def _expand(compact: Tensor, mask: Tensor, place: tuple[Tensor, Tensor]) -> Tensor:
    """The inverse of :func:`_compact`."""
    return torch.zeros(mask.shape, dtype=compact.dtype, device=compact.device).index_put((mask,), compact[place])


def _shift(x: Tensor, by: int) -> Tensor:
    """x_{t+by}, 0 past the end."""
    return pad(x[:, by:], (0, by))


def _row_lambda(lmbda: float | Tensor, like: Tensor) -> Tensor:
    """λ as float64 [B, 1] or [1, 1] on the device of ``like`` [B, T], checked."""
    lam = torch.as_tensor(lmbda, dtype=torch.float64, device=like.device)
    if lam.ndim:
        check_rows(like.shape[0], lmbda=lam)
    if not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lmbda must lie in [0, 1], got {lmbda}")
    return lam.reshape(-1, 1)


def _discounted_sum(x: Tensor, gamma: float, lmbda: float | Tensor) -> Tensor:
    """Σ_k (γλ)^k x_{t+k} for x [B, T], by recursive doubling: log2(T) vectorised steps instead of T.

    After step n an entry holds the sum of its next 2^n terms. The powers are kept in float64 per row.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    power = gamma * _row_lambda(lmbda, x)
    by = 1
    while by < x.shape[1]:
        x = x + power.to(x.dtype) * _shift(x, by)
        power = power.square()
        by *= 2
    return x
