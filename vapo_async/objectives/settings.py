"""What the policy's objective is made of: the algorithm's choices as the pure functions read them."""

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from vapo_async.config.algorithm import AlgorithmConfig, ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.checks import check_above, check_clip, check_range, check_scalars

Coefficient = Tensor | float
"""A number, or a tensor of shape [] that a scheduler changes; a tensor's value is never read on the host."""


@dataclass(frozen=True)
class PolicySettings:
    """Coefficients are numbers, or scalar tensors that a scheduler changes. None switches a term off.

    Raises ``ValueError`` for a number out of range, or ``dual_clip`` with ``dis`` or ``m2po``; the values of tensors
    are not checked, as that would wait for the device.
    """

    clip_low: Coefficient = 0.2
    clip_high: Coefficient = 0.28
    importance: ImportanceKind = ImportanceKind.naive
    behaviour_weight_cap: Coefficient | None = 5.0
    m2po_threshold: Coefficient = 0.04
    mismatch: MismatchKind = MismatchKind.none
    mismatch_low: float = 0.5
    mismatch_high: float = 2.0
    dual_clip: Coefficient | None = None
    aggregation: LossAggregation = LossAggregation.token
    nll_coef: Coefficient | None = 0.1
    entropy_coef: Coefficient | None = None
    kl_coef: Coefficient | None = None

    def __post_init__(self) -> None:
        _check_kind("importance", self.importance, ImportanceKind)
        _check_kind("mismatch", self.mismatch, MismatchKind)
        _check_kind("aggregation", self.aggregation, LossAggregation)
        check_scalars(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            behaviour_weight_cap=self.behaviour_weight_cap,
            m2po_threshold=self.m2po_threshold,
            dual_clip=self.dual_clip,
            nll_coef=self.nll_coef,
            entropy_coef=self.entropy_coef,
            kl_coef=self.kl_coef,
        )
        check_clip(self.clip_low, self.clip_high)
        check_above(0, behaviour_weight_cap=self.behaviour_weight_cap, m2po_threshold=self.m2po_threshold)
        check_above(1, dual_clip=self.dual_clip)
        check_range(self.mismatch_low, self.mismatch_high)
        if self.dual_clip is not None and self.importance in (ImportanceKind.dis, ImportanceKind.m2po):
            kind = self.importance.value
            raise ValueError(f"dual_clip must be None with importance '{kind}', which has no clip to bound")

    @classmethod
    def of(cls, algorithm: AlgorithmConfig) -> "PolicySettings":
        """From the configuration, where 0 switches a term off."""
        return cls(
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            importance=algorithm.importance,
            behaviour_weight_cap=algorithm.behaviour_weight_cap,
            m2po_threshold=algorithm.m2po_threshold,
            mismatch=algorithm.mismatch,
            mismatch_low=algorithm.mismatch_low,
            mismatch_high=algorithm.mismatch_high,
            dual_clip=algorithm.dual_clip,
            aggregation=algorithm.aggregation,
            nll_coef=algorithm.nll_coef or None,
            entropy_coef=algorithm.entropy_coef or None,
            kl_coef=algorithm.kl_coef or None,
        )


def _check_kind(name: str, value: object, kinds: type[Enum]) -> None:
    if not isinstance(value, kinds):
        names = ", ".join(f"{kinds.__name__}.{kind.name}" for kind in kinds)
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
