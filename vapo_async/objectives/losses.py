"""The learner's objectives on one micro-batch: pure functions of tensors and the algorithm's settings.

Every denominator is global to the optimizer mini-batch (all micro-batches, all ranks) and given by the caller, so that
losses and gradients of micro-batches simply add up. Metrics are sums, to be added over micro-batches and ranks and then
divided once by :func:`policy_metrics` and :func:`value_metrics`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vapo_async.config import AlgorithmConfig, ImportanceKind, LossAggregation
from vapo_async.objectives.aggregate import aggregate, denominator_of
from vapo_async.objectives.checks import check_mask, check_rows, check_same_shape
from vapo_async.objectives.importance import behaviour_weight, naive_ratio
from vapo_async.objectives.nll import positive_nll
from vapo_async.objectives.policy import approx_kl, clipped_surrogate, clipped_tokens
from vapo_async.objectives.value import value_loss

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Denominators:
    """What the losses of one optimizer mini-batch are divided by; sums over all its micro-batches and ranks.

    ``tokens``: response tokens; ``sequences``: responses with at least one; ``positive_tokens``: tokens of correct
    responses.
    """

    tokens: Tensor | float
    sequences: Tensor | float
    positive_tokens: Tensor | float


def denominators_of(mask: Tensor, correct: Tensor) -> Denominators:
    """Counts of a whole mini-batch (or of one rank's part, to be summed): mask [B, T] bool, correct [B] bool."""
    check_mask(mask)
    check_mask(correct)
    check_rows(mask.shape[0], correct=correct)
    return Denominators(
        tokens=denominator_of(mask, LossAggregation.token),
        sequences=denominator_of(mask, LossAggregation.sequence),
        positive_tokens=(mask & correct[:, None]).sum(),
    )


def vapo_policy_loss(
    log_prob: Tensor,
    entropy: Tensor | None,
    *,
    mask: Tensor,
    advantage: Tensor,
    sample_log_prob: Tensor,
    prox_log_prob: Tensor | None,
    correct: Tensor,
    algorithm: AlgorithmConfig,
    denominators: Denominators,
) -> tuple[Tensor, Sums]:
    """L = L_clip + μ L_NLL − c_H H: this micro-batch's share of VAPO's policy loss (arXiv 2504.05118).

    L_clip aggregates, per token (docs/methods.md),

    - naive: −min(ρ Â, clip(ρ) Â), ρ = π_θ/π_behav (PPO);
    - decoupled: −w min(r Â, clip(r) Â), r = π_θ/π_prox, w = min(π_prox/π_behav, c) a constant (AReaL, 2505.24298).

    L_NLL = Σ −log π_θ over the tokens of correct responses / their number in the mini-batch; exactly 0 without any.

    Args:
        log_prob: [B, T], log π_θ of the taken tokens; carries the gradient.
        entropy: [B, T] of π_θ; None where it is not at hand and ``entropy_coef`` is 0.
        mask: [B, T] bool, the response tokens; what stands outside is never read, NaN included.
        advantage: [B, T].
        sample_log_prob: [B, T], log π_behav.
        prox_log_prob: [B, T], log π_prox; None only with ``importance: naive``.
        correct: [B] bool.
        algorithm: reads importance, behaviour_weight_cap, clip_low, clip_high, aggregation, nll_coef, entropy_coef.
        denominators: of the global optimizer mini-batch.

    Returns:
        (loss, sums): scalar loss, and detached float64 scalars. ``loss_objective``, ``loss_nll`` and ``loss_entropy``,
        with their coefficients, are shares of the mini-batch's losses and add up to the loss; a term that is switched
        off has no entry. The others are sums over tokens, for :func:`policy_metrics`.
    """
    losses, sums = policy_terms(
        log_prob,
        entropy,
        mask=mask,
        advantage=advantage,
        sample_log_prob=sample_log_prob,
        prox_log_prob=prox_log_prob,
        correct=correct,
        algorithm=algorithm,
        denominators=denominators,
    )
    return sum(losses.values(), start=log_prob.new_zeros(())), sums


def policy_terms(
    log_prob: Tensor,
    entropy: Tensor | None,
    *,
    mask: Tensor,
    advantage: Tensor,
    sample_log_prob: Tensor,
    prox_log_prob: Tensor | None,
    correct: Tensor,
    algorithm: AlgorithmConfig,
    denominators: Denominators,
) -> tuple[Sums, Sums]:
    """The terms of :func:`vapo_policy_loss` one by one, with their gradients, and the same sums."""
    check_mask(mask)
    check_same_shape(2, log_prob=log_prob, mask=mask, advantage=advantage, sample_log_prob=sample_log_prob)
    if algorithm.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef is {algorithm.entropy_coef}: pass the entropy")
    if entropy is not None:
        check_same_shape(log_prob=log_prob, entropy=entropy)
    if prox_log_prob is not None:
        check_same_shape(log_prob=log_prob, prox_log_prob=prox_log_prob)

    def kept(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0)

    log_prob, advantage, sample = kept(log_prob), kept(advantage).detach(), kept(sample_log_prob).detach()
    match algorithm.importance:
        case ImportanceKind.naive:
            reference, weight = sample, torch.ones_like(sample)
        case ImportanceKind.decoupled:
            if prox_log_prob is None:
                raise ValueError("importance 'decoupled' needs prox_log_prob, the log-probs at the start of the batch")
            reference = kept(prox_log_prob).detach()
            weight = behaviour_weight(reference, sample, algorithm.behaviour_weight_cap)
    log_ratio = log_prob - reference
    surrogate = weight * clipped_surrogate(log_ratio, advantage, algorithm.clip_low, algorithm.clip_high)

    def share(per_token: Tensor) -> Tensor:
        how = algorithm.aggregation
        over = denominators.tokens if how is LossAggregation.token else denominators.sequences
        return aggregate(per_token, mask, how, over)

    losses = {"loss_objective": share(surrogate)}
    nll = positive_nll(log_prob, mask, correct)
    if algorithm.nll_coef != 0:
        nll_mean = aggregate(nll, mask, LossAggregation.token, denominators.positive_tokens)
        losses["loss_nll"] = algorithm.nll_coef * nll_mean
    sums = {"nll": nll.sum()}
    if entropy is not None:
        entropy = kept(entropy)
        sums["entropy"] = entropy.sum()
        if algorithm.entropy_coef != 0:
            losses["loss_entropy"] = -algorithm.entropy_coef * share(entropy)

    with torch.no_grad():
        low, high = clipped_tokens(log_ratio, advantage, algorithm.clip_low, algorithm.clip_high)
        ratio = kept(naive_ratio(log_prob, sample)).double()
        sums |= {
            "tokens": mask.sum(),
            "positive_tokens": (mask & correct[:, None]).sum(),
            "clip_low": low.sum(),
            "clip_high": high.sum(),
            "kl_behaviour": approx_kl(log_prob - sample).sum(),
            "kl_reference": approx_kl(log_ratio).sum(),
            "ratio": ratio.sum(),
            "ratio_squared": ratio.square().sum(),
            "behaviour_weight": kept(weight).sum(),
            "behaviour_weight_capped": (
                (reference - sample > math.log(algorithm.behaviour_weight_cap)).sum()
                if algorithm.behaviour_weight_cap is not None
                else mask.new_zeros((), dtype=torch.int64)
            ),
        }
    return losses, {key: value.detach().double() for key, value in (losses | sums).items()}


def policy_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mini-batch's metrics from the sums of its micro-batches: means per response token, losses as they are.

    ``nll`` is the mean over the tokens of correct responses.
    ``ess`` is the normalised effective sample size (Σρ)²/(N Σρ²) of ρ = π_θ/π_behav; ``kl_behaviour`` estimates
    KL(π_behav‖π_θ), ``kl_reference`` the same against the policy that the clip is centred on.
    """
    tokens = max(float(sums["tokens"]), 1.0)
    losses = {key: float(value) for key, value in sums.items() if key.startswith("loss_")}
    means = {
        key: float(value) / tokens
        for key, value in sums.items()
        if key not in ("tokens", "positive_tokens", "ratio_squared", "nll") and key not in losses
    }
    nll = float(sums["nll"]) / max(float(sums["positive_tokens"]), 1.0)
    squares = float(sums["ratio_squared"])
    ess = float(sums["ratio"]) ** 2 / (tokens * squares) if squares > 0 else 0.0
    return losses | means | {"nll": nll, "ess": ess, "positive_share": float(sums["positive_tokens"]) / tokens}


def vapo_value_loss(
    value: Tensor,
    value_target: Tensor,
    *,
    mask: Tensor,
    denominators: Denominators,
    old_value: Tensor | None = None,
    clip: float | None = None,
) -> tuple[Tensor, Sums]:
    """Σ ½ (V − R)² / tokens: this micro-batch's share of the critic's loss, always a mean over tokens.

    The aggregation switch belongs to the policy: the critic is a regression over states, each of which weighs the same.

    Args:
        value: [B, T], V(s_t); carries the gradient.
        value_target: [B, T].
        mask: [B, T] bool; what stands outside is never read.
        denominators: of the global optimizer mini-batch.
        old_value, clip: see :func:`vapo_async.objectives.value.value_loss`.

    Returns:
        (loss, sums): scalar loss, and detached float64 scalars for :func:`value_metrics`.
    """
    check_mask(mask)
    check_same_shape(2, value=value, value_target=value_target, mask=mask)
    if old_value is not None:
        check_same_shape(value=value, old_value=old_value)
        old_value = torch.where(mask, old_value, 0.0)
    value, target = torch.where(mask, value, 0.0), torch.where(mask, value_target, 0.0).detach()
    loss = aggregate(value_loss(value, target, old_value, clip), mask, LossAggregation.token, denominators.tokens)
    with torch.no_grad():
        v, r = value.double(), target.double()
        sums = {
            "loss_critic": loss.double(),
            "tokens": mask.sum().double(),
            "value": v.sum(),
            "target": r.sum(),
            "target_squared": r.square().sum(),
            "error": (r - v).sum(),
            "error_squared": (r - v).square().sum(),
        }
    return loss, {key: value.detach() for key, value in sums.items()}


def value_metrics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mini-batch's critic metrics: loss, means, explained variance 1 − Var(R − V)/Var(R) (0 for equal targets)."""
    tokens = max(float(sums["tokens"]), 1.0)
    value, target, error = (float(sums[key]) / tokens for key in ("value", "target", "error"))
    target_second, error_second = (float(sums[key]) / tokens for key in ("target_squared", "error_squared"))
    variance = target_second - target**2
    explained = 1 - (error_second - error**2) / variance if variance > 1e-12 * target_second else 0.0
    return {
        "loss_critic": float(sums["loss_critic"]),
        "value_mean": value,
        "target_mean": target,
        "explained_variance": explained,
    }


def add_sums(total: Sums, more: Mapping[str, Tensor]) -> Sums:
    """The key-wise sum of two micro-batches' metrics; ``total`` may be empty."""
    return {key: total[key] + value if key in total else value for key, value in more.items()}
