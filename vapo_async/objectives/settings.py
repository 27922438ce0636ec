"""What the policy's objective is made of: the algorithm's choices as the pure functions read them."""

from dataclasses import dataclass

from torch import Tensor

from vapo_async.config import AlgorithmConfig, ImportanceKind, LossAggregation, MismatchKind

Coefficient = Tensor | float


@dataclass(frozen=True)
class PolicySettings:
    """Coefficients are numbers, or scalar tensors that a scheduler changes. None switches a term off."""

    clip_low: Coefficient = 0.2
    clip_high: Coefficient = 0.28
    importance: ImportanceKind = ImportanceKind.naive
    behaviour_weight_cap: Coefficient | None = 5.0
    m2po_threshold: float = 0.04
    mismatch: MismatchKind = MismatchKind.none
    mismatch_low: float = 0.5
    mismatch_high: float = 2.0
    dual_clip: Coefficient | None = None
    aggregation: LossAggregation = LossAggregation.token
    nll_coef: Coefficient | None = 0.1
    entropy_coef: Coefficient | None = None
    kl_coef: Coefficient | None = None

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
