"""What a batch looks like before it is learned from: plain numbers for the metrics."""

import torch
from torch import Tensor

from vapo_async.learner.batch import LearnerBatch
from vapo_async.objectives.statistics import (
    AGE_EDGES,
    LENGTH_EDGES,
    bucket_of,
    explained_variance,
    explained_variance_by,
)


def batch_metrics(batch: LearnerBatch) -> dict[str, float]:
    """Rewards, lengths and ages."""
    lengths = batch.response_lengths.float()
    return {
        "reward": float(batch.reward.sum(1).mean()),
        "correct": float(batch.correct.float().mean()),
        "response_length": float(lengths.mean()),
        "response_length_max": float(lengths.max()),
        "truncated": float(batch.truncated.float().mean()),
        "mixed_versions": float(_mixed_versions(batch).float().mean()),
        "token_age": float(batch.age[batch.mask].float().mean()),
        "groups_mixed": _mixed_groups(batch),
    }


def critic_metrics(batch: LearnerBatch) -> dict[str, float]:
    """Explained variance over all tokens, and by token age and response length where there are any."""
    args = batch.state_value, batch.value_target, batch.mask
    metrics = {"explained_variance": float(explained_variance(*args))}
    length = batch.response_lengths[:, None].expand_as(batch.mask)
    for name, x, edges in (("age", batch.age, AGE_EDGES), ("length", length, LENGTH_EDGES)):
        by = explained_variance_by(*args, bucket_of(x, edges), len(edges) + 1)
        labels = (f"explained_variance_{name}_from_{low}" for low in (0, *edges))
        metrics |= {label: value for label, value in zip(labels, by.tolist(), strict=True) if value == value}  # not NaN
    return metrics


def _mixed_versions(batch: LearnerBatch) -> Tensor:
    """[N] bool: responses that a publication reached in flight, so that their tokens carry several versions."""
    last = batch.policy_version.masked_fill(~batch.mask, torch.iinfo(torch.int32).min).amax(1)
    first = batch.policy_version.masked_fill(~batch.mask, torch.iinfo(torch.int32).max).amin(1)
    return last > first


def _mixed_groups(batch: LearnerBatch) -> float:
    """Share of groups with right and wrong answers both: those that group-relative methods could learn from."""
    right: dict[int, set[bool]] = {}
    for group, correct in zip(batch.group_id.tolist(), batch.correct.tolist(), strict=True):
        right.setdefault(group, set()).add(correct)
    return sum(len(kinds) == 2 for kinds in right.values()) / len(right)
