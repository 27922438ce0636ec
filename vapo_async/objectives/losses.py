"""The learner's objectives on one micro-batch: pure functions of tensors and the algorithm's settings.

Every denominator is global to the optimizer mini-batch (all micro-batches, all ranks) and given by the caller, so that
losses and gradients of micro-batches simply add up. Metrics are sums, to be added over micro-batches and ranks and then
divided once by :func:`policy_metrics` and :func:`value_metrics`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vapo_async.config.algorithm import LossAggregation
from vapo_async.objectives.aggregate import aggregate, denominator_of
from vapo_async.objectives.checks import at_least_float32, check_boolean, check_mask, check_same_shape
from vapo_async.objectives.importance import naive_ratio
from vapo_async.objectives.nll import positive_nll, positive_tokens
from vapo_async.objectives.policy import approx_kl, kl_to_reference
from vapo_async.objectives.settings import Coefficient, PolicySettings
from vapo_async.objectives.surrogate import surrogate
from vapo_async.objectives.value import value_loss

Sums = dict[str, Tensor]
"""Detached float64 scalars by name."""
Terms = dict[str, Tensor]
"""Losses with gradient by name."""


@dataclass(frozen=True)
class Denominators:
    """What the losses of one optimizer mini-batch are divided by; sums over all its micro-batches and ranks.

    ``tokens``: response tokens; ``sequences``: responses with at least one; ``positive_tokens``: tokens of correct
    responses.
    """

    tokens: Tensor | float
    sequences: Tensor | float
    positive_tokens: Tensor | float


def denominators_of(mask: Tensor, correct: Tensor | None = None) -> Denominators:
    """Counts of a whole mini-batch, or of one rank's part, to be summed.

    ``mask``: bool [B, T], [B, T, 1] or, of flat steps, [N]. ``correct``: bool, per row, [B] or [B, 1], or of the mask's
    shape; without it no response counts as correct.
    """
    shape = mask.shape
    if mask.ndim == 3 and shape[-1] == 1:
        mask = mask.squeeze(-1)
    elif mask.ndim == 1:
        mask = mask[:, None]
    if mask.ndim != 2:
        raise ValueError(f"expected mask of shape [B, T], [B, T, 1] or [N], got {list(shape)}")
    if correct is not None and correct.shape in ((len(mask), 1), (*mask.shape, 1)):
        correct = correct.squeeze(-1)
    correct = mask.new_zeros(mask.shape[0]) if correct is None else correct
    return Denominators(
        tokens=denominator_of(mask, LossAggregation.token),
        sequences=denominator_of(mask, LossAggregation.sequence),
        positive_tokens=positive_tokens(mask, correct).sum(),
    )


def policy_terms(
    log_prob: Tensor,
    entropy: Tensor | None,
    *,
    mask: Tensor,
    advantage: Tensor,
    sample_log_prob: Tensor,
    prox_log_prob: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    age: Tensor | None = None,
    keep: Tensor | None = None,
    correct: Tensor | None = None,
    settings: PolicySettings,
    denominators: Denominators | None,
) -> tuple[Terms, Sums]:
    """L = L_objective + μ L_NLL − c_H H + β KL, this micro-batch's share of VAPO's policy loss (2504.05118).

    L_objective aggregates, per token (docs/methods.md; ρ = π_θ/π_behav, Â the advantage, f and sg constants),

    - naive: −min(ρ Â, clip(ρ) Â) (PPO, 1707.06347);
    - decoupled: −w min(r Â, clip(r) Â), r = π_θ/π_prox, w = sg min(π_prox/π_behav, cap) (AReaL, 2505.24298);
    - a3po: the same, π_prox interpolated between π_behav and π_θ by the token's age (2512.06547);
    - dis: −sg(f(ρ)) Â log π_θ, f(ρ) = ρ inside the clip range, else 0 (SAO, 2607.07508);
    - m2po: −ρ Â on the tokens that :func:`~vapo_async.objectives.importance.m2po_keep` leaves (2510.01161).

    L_NLL = Σ −log π_θ over the tokens of correct responses / their number in the mini-batch; exactly 0 without any.
    H is the entropy of π_θ, KL the estimate k3 of KL(π_θ‖π_ref) (GRPO, 2402.03300 eq. 4). Tokens that are dropped
    contribute 0 to L_objective only; every denominator counts them.

    Args:
        log_prob: [B, T], log π_θ of the taken tokens; carries the gradient. Halves are computed with in float32.
        entropy: [B, T] of π_θ; None where it is not at hand and ``entropy_coef`` is None.
        mask: [B, T] bool, the response tokens; what stands outside is never read, NaN included. May be empty.
        advantage: [B, T].
        sample_log_prob: [B, T], log π_behav.
        prox_log_prob: [B, T], log π_prox; needed by ``decoupled`` and by a mismatch correction.
        ref_log_prob: [B, T], log π_ref; needed by ``kl_coef``.
        age: [B, T], versions ≥ 0 from the token's sampling to the start of the batch; needed by ``a3po``.
        keep: [B, T] bool, False where the caller drops a token from L_objective: ``m2po_keep`` of the whole optimizer
            mini-batch. With ``m2po`` and None it is computed from this micro-batch alone.
        correct: the verifier's verdict, bool, [B] or per token [B, T]; needed by ``nll_coef``.
        settings: what the objective is made of.
        denominators: of the global optimizer mini-batch; None leaves every loss per token, [B, T], undivided.

    Returns:
        (losses, sums). ``losses``, with gradient and with their coefficients: ``loss_objective``, ``loss_nll``,
        ``loss_entropy``, ``loss_kl``, in this order; a term that is switched off has no entry; their sum is the loss.
        ``sums``: detached float64 scalars, the losses and sums over tokens, for :func:`policy_metrics`.

    Raises:
        ValueError: shapes differ, or an input that the settings need is None.
        TypeError: a mask is not boolean.
    """
    check_mask(mask)
    check_same_shape(2, log_prob=log_prob, mask=mask, advantage=advantage, sample_log_prob=sample_log_prob)
    optional = (entropy, prox_log_prob, ref_log_prob, age, keep)
    for name, given in zip(("entropy", "prox_log_prob", "ref_log_prob", "age", "keep"), optional, strict=True):
        if given is not None:
            check_same_shape(None, log_prob=log_prob, **{name: given})
    if keep is not None:
        check_boolean(keep=keep)

    def masked(x: Tensor) -> Tensor:
        return torch.where(mask, at_least_float32(x), 0.0)

    def constant(x: Tensor | None) -> Tensor | None:
        return None if x is None else masked(x.detach())

    log_prob, advantage, sample = masked(log_prob), masked(advantage.detach()), masked(sample_log_prob.detach())
    objective = surrogate(
        log_prob,
        mask=mask,
        advantage=advantage,
        sample_log_prob=sample,
        prox_log_prob=constant(prox_log_prob),
        age=constant(age),
        keep=keep,
        settings=settings,
    )

    def share(per_token: Tensor) -> Tensor:
        if denominators is None:
            return per_token
        how = settings.aggregation
        over = denominators.tokens if how is LossAggregation.token else denominators.sequences
        return aggregate(per_token, mask, how, over)

    losses = {"loss_objective": share(objective.loss)}
    sums: Sums = {}
    if correct is not None:
        nll = positive_nll(log_prob, mask, correct)
        sums |= {"nll": nll.sum(), "positive_tokens": positive_tokens(mask, correct).sum()}
        if settings.nll_coef is not None:
            if denominators is not None:
                nll = aggregate(nll, mask, LossAggregation.token, denominators.positive_tokens)
            losses["loss_nll"] = settings.nll_coef * nll
    elif settings.nll_coef is not None:
        raise ValueError("nll_coef is not None: pass correct, the verifier's verdict, bool [B]")
    if entropy is not None:
        entropy = masked(entropy)
        sums["entropy"] = entropy.sum()
        if settings.entropy_coef is not None:
            losses["loss_entropy"] = -settings.entropy_coef * share(entropy)
    elif settings.entropy_coef is not None:
        raise ValueError("entropy_coef is not None: pass entropy, of the policy's distribution, [B, T]")
    if ref_log_prob is not None:
        kl = kl_to_reference(log_prob, masked(ref_log_prob.detach()))
        sums["kl"] = kl.sum()
        if settings.kl_coef is not None:
            losses["loss_kl"] = settings.kl_coef * share(kl)
    elif settings.kl_coef is not None:
        raise ValueError("kl_coef is not None: pass ref_log_prob, the reference policy's log-probs, [B, T]")

    with torch.no_grad():
        ratio = torch.where(mask, naive_ratio(log_prob, sample), 0.0).double()
        sums |= {
            "tokens": mask.sum(),
            "kept": objective.keep.sum(),
            "clip_low": objective.clip_low.sum(),
            "clip_high": objective.clip_high.sum(),
            "kl_behaviour": approx_kl(log_prob - sample).sum(),
            "kl_reference": approx_kl(objective.log_ratio).sum(),
            "ratio": ratio.sum(),
            "ratio_squared": ratio.square().sum(),
            "behaviour_weight": torch.where(mask, objective.weight, 0.0).sum(),
            "behaviour_weight_capped": objective.capped.sum(),
        }
    return losses, {key: value.detach().double().sum() for key, value in (losses | sums).items()}


def policy_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mini-batch's metrics from the sums of its micro-batches: float64 scalars, losses as they are.

    Means are over response tokens. ``nll`` is over the tokens of correct responses, ``positive_share`` their share.
    ``kept_share``: tokens that ``m2po``, a mismatch correction or the caller left in the objective; ``clip_low`` and
    ``clip_high``: those of them whose gradient the clip took.
    ``ess`` is the normalised effective sample size (Σρ)²/(N Σρ²) of ρ = π_θ/π_behav; ``kl_behaviour`` estimates
    KL(π_behav‖π_θ), ``kl_reference`` the same against the policy that the clip is centred on, and ``kl`` KL(π_θ‖π_ref).
    ``nll`` and ``positive_share``, ``entropy`` and ``kl`` are there where their input was given.
    """
    sums = dict(sums)
    metrics = {key: sums.pop(key) for key in list(sums) if key.startswith("loss_")}
    tokens = sums.pop("tokens").clamp_min(1)
    squares = sums.pop("ratio_squared")
    metrics["ess"] = torch.where(squares > 0, sums["ratio"].square() / (tokens * squares.clamp_min(1e-300)), 0.0)
    metrics["kept_share"] = sums.pop("kept") / tokens
    if "positive_tokens" in sums:
        positive = sums.pop("positive_tokens")
        metrics |= {"nll": sums.pop("nll") / positive.clamp_min(1), "positive_share": positive / tokens}
    return metrics | {key: value / tokens for key, value in sums.items()}


def vapo_value_loss(
    value: Tensor,
    value_target: Tensor,
    *,
    mask: Tensor,
    denominators: Denominators,
    old_value: Tensor | None = None,
    clip: Coefficient | None = None,
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
    value = torch.where(mask, at_least_float32(value), 0.0)
    target = torch.where(mask, at_least_float32(value_target.detach()), 0.0)
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


def value_metrics(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mini-batch's critic metrics, float64 scalars: loss, means, explained variance 1 − Var(R − V)/Var(R).

    Explained variance is 0 where all targets are equal.
    """
    tokens = sums["tokens"].clamp_min(1)
    value, target, error = (sums[key] / tokens for key in ("value", "target", "error"))
    target_second, error_second = (sums[key] / tokens for key in ("target_squared", "error_squared"))
    variance = target_second - target.square()
    explained = 1 - (error_second - error.square()) / variance
    return {
        "loss_critic": sums["loss_critic"],
        "value_mean": value,
        "target_mean": target,
        "explained_variance": torch.where(variance > 1e-12 * target_second, explained, 0.0),
    }


def add_sums(total: Sums, more: Mapping[str, Tensor]) -> Sums:
    """The key-wise sum of two micro-batches' metrics; ``total`` may be empty."""
    return {key: total[key] + value if key in total else value for key, value in more.items()}
