"""Importance ratios between three policies, and what corrects them.

π_θ is the policy being optimised, π_prox the learner's at the start of the batch, π_behav what sampled the token.
"""

import math

import torch
from torch import Tensor

from vapo_async.config.algorithm import MismatchKind
from vapo_async.objectives.checks import check_above, check_clip, check_mask, check_range, check_same_shape
from vapo_async.objectives.settings import Coefficient

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ±20 before the exponential (e^20 ≈ 5e8), so that no ratio overflows into NaN gradients."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """e^x of x clamped to ±LOG_RATIO_LIMIT, any shape; without gradient beyond the limit."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def naive_ratio(log_prob: Tensor, sample_log_prob: Tensor) -> Tensor:
    """ρ = π_θ / π_behav per token (PPO, arXiv 1707.06347). Equal shapes; differentiable in ``log_prob``."""
    check_same_shape(log_prob=log_prob, sample_log_prob=sample_log_prob)
    return bounded_exp(log_prob - sample_log_prob)


def behaviour_weight(prox_log_prob: Tensor, sample_log_prob: Tensor) -> Tensor:
    """w = π_prox / π_behav per token, a constant: no gradient (AReaL, arXiv 2505.24298). Equal shapes."""
    return naive_ratio(prox_log_prob.detach(), sample_log_prob.detach())


def a3po_prox_log_prob(log_prob: Tensor, sample_log_prob: Tensor, age: Tensor) -> Tensor:
    """log π_prox ≈ log π_behav + d/(d + 1) · (log π_θ − log π_behav), a constant (A-3PO, arXiv 2512.06547).

    The token was sampled d versions before π_prox, and π_θ is one version ahead of π_prox: log-linear in between, so
    no pass through the model is needed.

    Args:
        log_prob: log π_θ, [B, T].
        sample_log_prob: log π_behav, [B, T].
        age: d ≥ 0 in versions, [B, T], any real dtype. At d = 0 the result is exactly log π_behav.

    The log-ratio is clamped to ±LOG_RATIO_LIMIT.
    """
    check_same_shape(log_prob=log_prob, sample_log_prob=sample_log_prob, age=age)
    log_prob, sample_log_prob = log_prob.detach(), sample_log_prob.detach()
    age = age.to(log_prob.dtype)
    step = (log_prob - sample_log_prob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return sample_log_prob + age / (age + 1) * step


def dis_weight(log_ratio: Tensor, clip_low: Coefficient, clip_high: Coefficient) -> Tensor:
    """f(ρ) = ρ where 1 − ε_low < ρ < 1 + ε_high, else 0; a constant: no gradient (SAO, arXiv 2607.07508).

    ``log_ratio``: log ρ = log π_θ − log π_behav, any shape; the result has the same one.
    """
    check_clip(clip_low, clip_high)
    ratio = bounded_exp(log_ratio.detach())
    return torch.where((ratio > 1 - clip_low) & (ratio < 1 + clip_high), ratio, 0.0)


def m2po_keep(log_ratio: Tensor, advantage: Tensor, mask: Tensor, threshold: Coefficient) -> Tensor:
    """The tokens that second-moment trust masking keeps (M2PO, arXiv 2510.01161).

    Harmful tokens (A > 0 with ρ > 1, or A < 0 with ρ < 1: the update would move them further away) are dropped in
    descending order of (log ρ)², the earlier one in row-major order first where equal, until the mean of (log ρ)² over
    the tokens that are left is below ``threshold``. Where even that of the harmless ones is not, all harmful tokens are
    dropped, and the harmless stay. To be called with a whole optimizer mini-batch: its parts' means differ.

    Args:
        log_ratio: log ρ = log π_θ − log π_behav, [B, T].
        advantage: [B, T].
        mask: [B, T] bool; what stands outside is never read, and how a row is padded changes nothing.
        threshold: τ > 0; 0.04 in the paper.

    Returns:
        [B, T] bool, False outside the mask.
    """
    check_same_shape(2, log_ratio=log_ratio, advantage=advantage, mask=mask)
    check_mask(mask)
    check_above(0, threshold=threshold)
    log_ratio = torch.where(mask, log_ratio.detach(), 0.0).double().flatten()
    advantage = torch.where(mask, advantage.detach(), 0.0).flatten()
    squares = log_ratio.square()
    harmful = ((advantage > 0) & (log_ratio > 0)) | ((advantage < 0) & (log_ratio < 0))
    # harmful tokens first, largest in front; what follows keeps its order, so that padding adds zeros and no more
    order = torch.where(harmful, squares, -1.0).argsort(descending=True, stable=True)
    left = squares[order].flip(0).cumsum(0).flip(0)  # sums of what is left once the first 0, 1, 2, ... are dropped
    count = mask.sum().double() - torch.arange(len(order), device=order.device)
    far = left >= threshold * count
    must_drop = harmful[order] & ((~far).cumsum(0) == 0)
    return mask & ~torch.zeros_like(harmful).scatter(0, order, must_drop).view_as(mask)


def mismatch_correction(
    kind: MismatchKind, sample_log_prob: Tensor, prox_log_prob: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """What is done about m = π_prox / π_behav, where engine and learner disagree or the data is stale.

    - ``none``: nothing.
    - ``tis``: m is truncated, m' = min(m, high), by raising the behaviour's log-prob to log π_prox − log high. Every
      ratio against the behaviour contains m as a factor exactly once, so this goes with every importance kind
      (truncated importance sampling; IMPALA, arXiv 1802.01561, for language models verl's rollout correction).
    - ``icepop``: tokens with m outside [low, high] are dropped (IcePop, arXiv 2510.18855).
    - ``mis``: a response is dropped where the geometric mean of m over its tokens is outside [low, high] (masked
      importance sampling, verl's rollout correction).

    Args:
        kind: the correction.
        sample_log_prob: log π_behav, [B, T].
        prox_log_prob: log π_prox, [B, T].
        mask: [B, T] bool; a row is a response. What stands outside is never read.
        low, high: 0 ≤ low < high, the range of m; ``tis`` reads ``high`` only.

    Returns:
        (log π_behav' [B, T], 0 outside the mask; tokens kept [B, T] bool, False outside the mask), without gradient.
    """
    check_same_shape(2, sample_log_prob=sample_log_prob, prox_log_prob=prox_log_prob, mask=mask)
    check_mask(mask)
    check_range(low, high)
    sample = torch.where(mask, sample_log_prob.detach(), 0.0)
    prox = torch.where(mask, prox_log_prob.detach(), 0.0)
    log_low, log_high = math.log(low) if low > 0 else -math.inf, math.log(high)
    match kind:
        case MismatchKind.none:
            return sample, mask
        case MismatchKind.tis:
            return torch.maximum(sample, torch.where(mask, prox - log_high, -math.inf)), mask
        case MismatchKind.icepop:
            log_m = prox - sample
        case MismatchKind.mis:
            log_m = (prox - sample).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return sample, mask & (log_m >= log_low) & (log_m <= log_high)
