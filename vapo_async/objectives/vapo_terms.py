"""The policy's terms from a batch of steps: which entries they need, what is read, and how it is reduced."""

from dataclasses import dataclass

import torch
from tensordict import NestedKey
from torch import Tensor

from vapo_async.config.algorithm import ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.losses import Denominators, Sums, Terms, denominators_of, policy_terms
from vapo_async.objectives.settings import PolicySettings
from vapo_async.objectives.vapo_inputs import StepInputs, VAPOKeys

UNDIVIDED = Denominators(tokens=1, sequences=1, positive_tokens=1)


def needed_names(settings: PolicySettings) -> list[str]:
    """The names, as in ``VAPOKeys``, of what the terms that are on read, in a fixed order."""
    off_policy = settings.importance is ImportanceKind.decoupled or settings.mismatch is not MismatchKind.none
    needs = {
        "sample_log_prob": True,
        "prox_log_prob": off_policy,
        "policy_age": settings.importance is ImportanceKind.a3po,
        "ref_log_prob": settings.kl_coef is not None,
        "correct": settings.nll_coef is not None,
        "advantage": True,
    }
    return [name for name, needed in needs.items() if needed]


@dataclass(frozen=True)
class PolicyBatch:
    """The arguments of :func:`~vapo_async.objectives.losses.policy_terms`.

    Where nothing is summed by rows every step is a row, [N, 1]: packed rows have several verdicts, flat
    batches no rows. Else a row is a response, [B, T].
    """

    log_prob: Tensor
    entropy: Tensor | None
    mask: Tensor
    entries: dict[str, Tensor]
    correct: Tensor | None
    keep: Tensor | None
    settings: PolicySettings
    shape: torch.Size

    @classmethod
    def read(
        cls, inputs: StepInputs, keys: VAPOKeys, settings: PolicySettings, mask: Tensor, entropy: Tensor | None
    ) -> "PolicyBatch":
        """What ``settings`` need; ``ValueError`` as in :class:`StepInputs`, and where rows are needed but not there."""
        by_rows = settings.aggregation is LossAggregation.sequence or settings.mismatch is MismatchKind.mis
        if by_rows and mask.ndim == 1:
            what = "mismatch 'mis'" if settings.mismatch is MismatchKind.mis else "aggregation 'sequence'"
            raise ValueError(f"{what} needs a row per response, [B, T], but the input is flat, {list(mask.shape)}")

        def rows(x: Tensor) -> Tensor:
            return x if by_rows else x.reshape(-1, 1)

        def entry(name: str) -> Tensor:
            key = getattr(keys, name)
            return inputs.age(key, mask) if name == "policy_age" else inputs.required(name, key, mask)

        names = [name for name in needed_names(settings) if name != "correct"]
        correct = None if settings.nll_coef is None else inputs.correct(keys.correct)
        if correct is not None:
            correct = (correct & mask).any(1) if by_rows else correct.flatten()
        keep = inputs.optional(keys.keep)
        return cls(
            log_prob=rows(inputs.like),
            entropy=None if entropy is None else rows(entropy),
            mask=rows(mask),
            entries={name: rows(entry(name)) for name in names},
            correct=correct,
            keep=None if keep is None else rows(keep),
            settings=settings,
            shape=mask.shape,
        )

    def denominators(self) -> Denominators:
        """The counts of this batch alone."""
        return denominators_of(self.mask, self.correct)

    def terms(self, denominators: Denominators | None) -> tuple[Terms, Sums]:
        """The terms as this batch's shares of the mini-batch, and the sums for the metrics.

        With None the terms are per step, [N] or [B, T], with their coefficients, not summed and not divided.
        """
        if denominators is not None and not isinstance(denominators, Denominators):
            raise ValueError(f"denominators must be None or what denominators_of returns, got {denominators!r}")
        age = self.entries.get("policy_age")
        given = {name: entry for name, entry in self.entries.items() if name != "policy_age"}
        losses, sums = policy_terms(
            self.log_prob,
            self.entropy,
            mask=self.mask,
            **given,
            age=age,
            keep=self.keep,
            correct=self.correct,
            settings=self.settings,
            denominators=denominators,
        )
        if denominators is None:
            losses = {name: loss.reshape(self.shape) for name, loss in losses.items()}
        return losses, sums


def keys_of(keys: VAPOKeys, names: list[str]) -> list[NestedKey]:
    """The keys of the entries ``names``, those of composite actions one by one, without what is switched off."""
    found: list[NestedKey] = []
    for name in names:
        key = getattr(keys, name)
        found += key if isinstance(key, list) else [] if key is None else [key]
    return found
