"""The policy's objective per token, for every way of correcting the lag (docs/methods.md)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vapo_async.config.algorithm import ImportanceKind, MismatchKind
from vapo_async.objectives.importance import (
    a3po_prox_log_prob,
    behaviour_weight,
    dis_weight,
    m2po_keep,
    mismatch_correction,
    naive_ratio,
)
from vapo_async.objectives.policy import clipped_surrogate, clipped_tokens
from vapo_async.objectives.settings import PolicySettings


@dataclass(frozen=True)
class Surrogate:
    """Per token, all [B, T].

    ``loss`` carries the gradient and is 0 where not ``keep`` ⊆ mask. ``log_ratio`` is of π_θ to the policy that the
    clip is centred on; ``weight`` is the behaviour's, 1 where the objective has none, ``capped`` where its bound holds;
    ``clip_low`` and ``clip_high`` say where clip or ``dis`` took the gradient of a kept token.
    """

    loss: Tensor
    keep: Tensor
    log_ratio: Tensor
    weight: Tensor
    capped: Tensor
    clip_low: Tensor
    clip_high: Tensor


def surrogate(
    log_prob: Tensor,
    *,
    mask: Tensor,
    advantage: Tensor,
    sample_log_prob: Tensor,
    prox_log_prob: Tensor | None,
    age: Tensor | None,
    keep: Tensor | None,
    settings: PolicySettings,
) -> Surrogate:
    """What :func:`vapo_async.objectives.losses.policy_terms` aggregates; its arguments, with 0 outside the mask."""
    s = settings
    kind = s.importance
    if kind is ImportanceKind.m2po and keep is None:
        keep = m2po_keep(log_prob.detach() - sample_log_prob, advantage, mask, s.m2po_threshold)
    keep = mask if keep is None else mask & keep
    if s.mismatch is not MismatchKind.none:
        prox = _given(prox_log_prob, f"mismatch '{s.mismatch.value}'")
        sample_log_prob, matched = mismatch_correction(
            s.mismatch, sample_log_prob, prox, mask, s.mismatch_low, s.mismatch_high
        )
        keep = keep & matched
    centre = sample_log_prob
    weight = torch.ones_like(sample_log_prob)
    capped = clip_low = clip_high = torch.zeros_like(mask)
    if kind in (ImportanceKind.decoupled, ImportanceKind.a3po):
        if kind is ImportanceKind.decoupled:
            centre = _given(prox_log_prob, "importance 'decoupled'")
        elif age is None:
            raise ValueError("importance 'a3po' needs age, the versions between sampling and learning, [B, T]")
        else:
            centre = a3po_prox_log_prob(log_prob, sample_log_prob, age)
        weight = behaviour_weight(centre, sample_log_prob)
        if s.behaviour_weight_cap is not None:
            capped = weight > s.behaviour_weight_cap
            weight = weight.clamp(max=s.behaviour_weight_cap)
    log_ratio = log_prob - centre
    match kind:
        case ImportanceKind.naive | ImportanceKind.decoupled | ImportanceKind.a3po:
            loss = weight * clipped_surrogate(log_ratio, advantage, s.clip_low, s.clip_high, s.dual_clip)
            clip_low, clip_high = clipped_tokens(log_ratio, advantage, s.clip_low, s.clip_high, s.dual_clip)
        case ImportanceKind.dis:
            inside = dis_weight(log_ratio, s.clip_low, s.clip_high)
            loss = torch.where(inside > 0, -inside * advantage * log_prob, 0.0)  # never 0 · −∞
            clip_low, clip_high = (inside == 0) & (log_ratio < 0), (inside == 0) & (log_ratio >= 0)
        case ImportanceKind.m2po:
            loss = -naive_ratio(log_prob, sample_log_prob) * advantage
    return Surrogate(
        loss=torch.where(keep, loss, 0.0),
        keep=keep,
        log_ratio=log_ratio.detach(),
        weight=weight,
        capped=capped & mask,
        clip_low=clip_low & keep,
        clip_high=clip_high & keep,
    )


def _given(prox_log_prob: Tensor | None, what: str) -> Tensor:
    if prox_log_prob is None:
        raise ValueError(f"{what} needs prox_log_prob, the learner's log-probs at the start of the batch, [B, T]")
    return prox_log_prob
