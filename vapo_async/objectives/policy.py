"""The clipped surrogate per token, what it did (clip fractions, KL estimates), and the KL to a reference policy."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_above, check_clip, check_same_shape
from vapo_async.objectives.importance import LOG_RATIO_LIMIT, bounded_exp
from vapo_async.objectives.settings import Coefficient


def clipped_surrogate(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_low: Coefficient,
    clip_high: Coefficient,
    dual_clip: Coefficient | None = None,
) -> Tensor:
    """−min(r Â, clip(r, 1 − ε_low, 1 + ε_high) Â) per token (PPO, arXiv 1707.06347; Clip-Higher, arXiv 2503.14476).

    With ``dual_clip`` = c, where Â < 0: −max(min(r Â, clip(r) Â), c Â), which bounds the loss of a bad token that has
    become much more likely (Dual-clip PPO, arXiv 1912.09729).

    Args:
        log_ratio: log r, any shape; clamped to ±LOG_RATIO_LIMIT.
        advantage: Â, the same shape; a constant.
        clip_low, clip_high: 0 ≤ ε_low < 1 and 0 ≤ ε_high.
        dual_clip: c > 1; None = off.

    Returns:
        the per-token loss, differentiable in ``log_ratio``.
    """
    check_same_shape(log_ratio=log_ratio, advantage=advantage)
    check_clip(clip_low, clip_high)
    check_above(1, dual_clip=dual_clip)
    ratio = bounded_exp(log_ratio)
    advantage = advantage.detach()
    clipped = ratio.clamp(min=1 - clip_low).clamp(max=1 + clip_high)  # apart, as one may be a tensor
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return -gain


def clipped_tokens(
    log_ratio: Tensor,
    advantage: Tensor,
    clip_low: Coefficient,
    clip_high: Coefficient,
    dual_clip: Coefficient | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens whose gradient the clip removes, bool (low, high), of the arguments' shape.

    low: r < 1 − ε_low and Â < 0. high: r > 1 + ε_high and Â > 0, or r > ``dual_clip`` and Â < 0.
    """
    check_same_shape(log_ratio=log_ratio, advantage=advantage)
    check_clip(clip_low, clip_high)
    check_above(1, dual_clip=dual_clip)
    ratio = bounded_exp(log_ratio.detach())
    low, high = (ratio < 1 - clip_low) & (advantage < 0), (ratio > 1 + clip_high) & (advantage > 0)
    return low, high if dual_clip is None else high | ((ratio > dual_clip) & (advantage < 0))


def approx_kl(log_ratio: Tensor) -> Tensor:
    """k3 = (r − 1) − log r ≥ 0 per token: with samples of q and r = p/q its mean is an unbiased estimate of KL(q‖p).

    (Schulman, "Approximating KL divergence", 2020.) Same shape as ``log_ratio``; no gradient.
    """
    log_ratio = log_ratio.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.expm1() - log_ratio


def kl_to_reference(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """π_ref/π_θ − log(π_ref/π_θ) − 1 ≥ 0 per token, with gradient (GRPO, arXiv 2402.03300 eq. 4).

    An estimate (k3) of KL(π_θ‖π_ref) from tokens of π_θ.

    Args:
        log_prob: log π_θ, any shape; carries the gradient 1 − π_ref/π_θ, none where π_ref/π_θ > e^LOG_RATIO_LIMIT.
        ref_log_prob: log π_ref, the same shape; a constant.
    """
    check_same_shape(log_prob=log_prob, ref_log_prob=ref_log_prob)
    log_ratio = (ref_log_prob.detach() - log_prob).clamp(max=LOG_RATIO_LIMIT)
    return log_ratio.expm1() - log_ratio
