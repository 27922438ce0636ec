"""How far the engine's log-probs lie from the learner's for the same weights: numbers, and the worst tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_mask, check_same_shape

RATIO_LOW, RATIO_HIGH = 0.9, 1.1
"""Ratios in between, ends included, are close."""


@dataclass(frozen=True)
class Mismatch:
    """Over some tokens, with Δ = log p_learner − log p_engine and r = exp(Δ); all NaN where there are no tokens."""

    tokens: int
    mean: float
    """Mean of abs(Δ), nats."""
    max: float
    """Largest abs(Δ), nats."""
    kl: float
    """Mean of r − 1 − log r, nats: see :func:`engine_mismatch`."""
    outside: float
    """Share of tokens with r outside [0.9, 1.1], in [0, 1]."""


def engine_mismatch(engine_log_prob: Tensor, learner_log_prob: Tensor, mask: Tensor) -> Mismatch:
    """Compares the log-probs of tokens that the engine sampled, accumulated in float64.

    ``kl`` is the estimator k3 = r − 1 − log r of KL(engine ‖ learner) under tokens of the engine: never negative,
    unbiased, of smaller variance than −log r (Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html).

    Args:
        engine_log_prob: any shape; not read outside the mask.
        learner_log_prob: the same shape, under the same weights and temperature.
        mask: the same shape, bool, the tokens to compare.

    Raises:
        ValueError: shapes that differ.
        TypeError: a mask that is not boolean.
    """
    log_ratio = _log_ratio(engine_log_prob, learner_log_prob, mask)[mask]
    if not len(log_ratio):
        return Mismatch(0, *[float("nan")] * 4)
    gap = log_ratio.abs()
    ratio = log_ratio.exp()
    inside = (ratio >= RATIO_LOW) & (ratio <= RATIO_HIGH)  # NaN is not
    found = torch.stack(
        [gap.mean(), gap.max(), (torch.expm1(log_ratio) - log_ratio).mean(), 1 - inside.double().mean()]
    )
    return Mismatch(len(log_ratio), *found.tolist())


def worst_tokens(engine_log_prob: Tensor, learner_log_prob: Tensor, mask: Tensor, count: int) -> list[tuple[int, int]]:
    """(row, column) of the ``count`` tokens of ``mask`` whose log-probs differ most, the worst first; NaN is the worst.

    Args: as for :func:`engine_mismatch`, each [N, T]. Fewer masked tokens than ``count``: all of them.
    """
    gap = _log_ratio(engine_log_prob, learner_log_prob, mask).abs().masked_fill(~mask, -1.0)
    flat = gap.flatten()
    best = flat.topk(min(count, int(mask.sum()))).indices.tolist()
    return [divmod(index, mask.shape[1]) for index in best]


def _log_ratio(engine_log_prob: Tensor, learner_log_prob: Tensor, mask: Tensor) -> Tensor:
    check_same_shape(engine_log_prob=engine_log_prob, learner_log_prob=learner_log_prob, mask=mask)
    check_mask(mask)
    return learner_log_prob.detach().double() - engine_log_prob.detach().double()
