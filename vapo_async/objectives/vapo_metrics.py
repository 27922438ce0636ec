"""The critic's loss, and its explained variance by age and length of what it judges, without waiting for a device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vapo_async.objectives.advantage import trajectory_lengths
from vapo_async.objectives.losses import Denominators, value_metrics, vapo_value_loss
from vapo_async.objectives.statistics import AGE_EDGES, LENGTH_EDGES, bucket_of, explained_variance_by
from vapo_async.objectives.value import value_loss


@dataclass(frozen=True)
class CriticSteps:
    """A critic's values beside their targets, [N] or [B, T]."""

    value: Tensor
    target: Tensor
    mask: Tensor

    def loss(
        self, old_value: Tensor | None, clip: Tensor | None, denominators: Denominators, reduction: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """½ (V − R)², its share of the mini-batch or (``reduction="none"``) per step, and ``value_metrics``."""

        def rows(x: Tensor) -> Tensor:
            return x.reshape(-1, 1)

        old_rows = None if old_value is None else rows(old_value)
        loss, sums = vapo_value_loss(
            rows(self.value),
            rows(self.target),
            mask=rows(self.mask),
            denominators=denominators,
            old_value=old_rows,
            clip=clip,
        )
        if reduction == "none":
            value, target = (torch.where(self.mask, x, 0.0) for x in (self.value, self.target))
            old = None if old_value is None else torch.where(self.mask, old_value, 0.0)
            loss = torch.where(self.mask, value_loss(value, target, old, clip), 0.0)
        return loss, value_metrics(sums)

    def explained_variance(
        self,
        age: Tensor | None,
        done: Tensor | None,
        segment_ids: Tensor | None,
        age_edges: tuple[int, ...] = AGE_EDGES,
        length_edges: tuple[int, ...] = LENGTH_EDGES,
    ) -> dict[str, Tensor]:
        """``explained_variance_by_age`` (all NaN without ages) and ``_by_length`` (all NaN where the steps are flat).

        A trajectory ends where ``done`` or where ``segment_ids`` change; without both a row is one. Flat steps may
        stand in any order, so that their trajectories' lengths are not known.
        """
        mask = self.mask if self.mask.ndim == 2 else self.mask[:, None]

        def by(bucket: Tensor, edges: tuple[int, ...]) -> Tensor:
            value, target = self.value.reshape(mask.shape), self.target.reshape(mask.shape)
            return explained_variance_by(value, target, mask, bucket.reshape(mask.shape), len(edges) + 1)

        def unknown(edges: tuple[int, ...]) -> Tensor:
            return torch.full((len(edges) + 1,), math.nan, dtype=torch.float64, device=mask.device)

        by_age = unknown(age_edges) if age is None else by(bucket_of(age, age_edges), age_edges)
        if self.mask.ndim == 1:
            return {"explained_variance_by_age": by_age, "explained_variance_by_length": unknown(length_edges)}
        ends = None if done is None else done.reshape(mask.shape)
        if segment_ids is not None:
            change = torch.zeros_like(mask)
            change[:, :-1] = segment_ids.diff(dim=1) != 0
            ends = change if ends is None else ends | change
        lengths = trajectory_lengths(mask, ends)
        return {
            "explained_variance_by_age": by_age,
            "explained_variance_by_length": by(bucket_of(lengths, length_edges), length_edges),
        }
