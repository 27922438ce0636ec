"""The clipped surrogate per token, and what it did: clip fractions and KL estimates."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_mask, check_same_shape
from vapo_async.objectives.importance import LOG_RATIO_LIMIT


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """−min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â) per token (PPO, arXiv 1707.06347; Clip-Higher, arXiv 2503.14476).

    Args:
        log_ratio: log r, any shape; clamped to ±LOG_RATIO_LIMIT.
        advantage: Â, the same shape; a constant.
        clip_low, clip_high: 0 ≤ ε_low < 1 and 0 ≤ ε_high.

    Returns:
        the per-token loss, differentiable in ``log_ratio``.
    """
    check_same_shape(log_ratio=log_ratio, advantage=advantage)
    check_clip(clip_low, clip_high)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def clipped_tokens(log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """Tokens whose gradient the clip removes: (low: r < 1 − ε_low and Â < 0, high: r > 1 + ε_high and Â > 0), bool."""
    check_same_shape(log_ratio=log_ratio, advantage=advantage)
    check_clip(clip_low, clip_high)
    ratio = log_ratio.detach().exp()
    return (ratio < 1 - clip_low) & (advantage < 0), (ratio > 1 + clip_high) & (advantage > 0)


def clip_fractions(
    log_ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Shares (low, high) of the masked tokens in :func:`clipped_tokens`; scalars, 0 for an empty mask."""
    check_same_shape(log_ratio=log_ratio, mask=mask)
    check_mask(mask)
    low, high = clipped_tokens(log_ratio, advantage, clip_low, clip_high)
    count = mask.sum().clamp_min(1)
    return (low & mask).sum() / count, (high & mask).sum() / count


def approx_kl(log_ratio: Tensor) -> Tensor:
    """k3 = (r − 1) − log r ≥ 0 per token: with samples of q and r = p/q its mean is an unbiased estimate of KL(q‖p).

    (Schulman, "Approximating KL divergence", 2020.) Same shape as ``log_ratio``; no gradient.
    """
    log_ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.expm1() - log_ratio


def check_clip(clip_low: float, clip_high: float) -> None:
    """Raises ``ValueError`` unless 0 ≤ ε_low < 1 and 0 ≤ ε_high."""
    if not 0 <= clip_low < 1 or not clip_high >= 0:
        raise ValueError(f"expected 0 <= clip_low < 1 and clip_high >= 0, got {clip_low} and {clip_high}")
