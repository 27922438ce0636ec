"""Importance ratios between the learner's policy, the proximal one (start of the batch) and the one that sampled."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_mask, check_same_shape

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 before the exponential (e^20 ≈ 5e8), so that no ratio overflows into NaN gradients."""


def naive_ratio(log_prob: Tensor, sample_log_prob: Tensor) -> Tensor:
    """ρ = π_θ / π_behav per token (PPO, arXiv 1707.06347). Equal shapes; differentiable in ``log_prob``."""
    check_same_shape(log_prob=log_prob, sample_log_prob=sample_log_prob)
    return (log_prob - sample_log_prob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def behaviour_weight(prox_log_prob: Tensor, sample_log_prob: Tensor, cap: float | None) -> Tensor:
    """w = min(π_prox / π_behav, cap) per token, a constant: no gradient (AReaL, arXiv 2505.24298).

    Equal shapes; ``cap`` > 0, None = no cap.
    """
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be positive or None, got {cap}")
    weight = naive_ratio(prox_log_prob.detach(), sample_log_prob.detach())
    return weight if cap is None else weight.clamp(max=cap)


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """(Σw)² / (N Σw²) over the N masked weights: 1 for equal weights, 1/N when one dominates; 0 without any weight.

    Equal shapes. Returns a scalar float64. Invariant to the weights' scale (VCPO, arXiv 2602.17616).
    """
    check_same_shape(weights=weights, mask=mask)
    check_mask(mask)
    w = torch.where(mask, weights.detach(), 0.0).double()
    squares = w.square().sum() * mask.sum()
    return torch.where(squares > 0, w.sum().square() / squares.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
