"""Means and variances over masked steps, without waiting for a device: whitening, explained variance."""

import torch
from torch import Tensor

from vapo_async.objectives.checks import check_mask, check_same_shape, result_dtype

AGE_EDGES = (1, 2, 4, 8)
"""Buckets of age in versions: 0, 1, 2–3, 4–7, 8 and more."""
LENGTH_EDGES = (64, 256, 1024, 4096, 16_384)
"""Buckets of response length in tokens: below 64, 256, 1,024, 4,096, 16,384, and from there on."""


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(var + ε) over the masked entries, var unbiased; 0 outside the mask. Shapes [B, T]."""
    check_same_shape(x=x, mask=mask)
    check_mask(mask)
    kept = torch.where(mask, x, 0.0).to(result_dtype(x))
    count = mask.sum()
    centred = torch.where(mask, kept - kept.sum() / count.clamp_min(1), 0.0)
    return centred * (centred.square().sum() / (count - 1).clamp_min(1) + eps).rsqrt()


def explained_variance(value: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the masked entries; 0 where all targets are equal, since nothing can be explained.

    Args: value, target, mask: [B, T]. Returns: scalar float64, at most 1, negative for a critic worse than a constant;
    0 for an empty mask.
    """
    found = explained_variance_by(value, target, mask, torch.zeros_like(mask, dtype=torch.int64), 1)[0]
    return torch.where(mask.any(), found, 0.0)


def explained_variance_by(value: Tensor, target: Tensor, mask: Tensor, bucket: Tensor, buckets: int) -> Tensor:
    """:func:`explained_variance` within each bucket of steps (by age, by length, ...).

    Args:
        value, target: [B, T]; not read outside the mask.
        mask: [B, T] bool.
        bucket: [B, T] int64 in [0, buckets), which one a step is in; see :func:`bucket_of`.
        buckets: how many there are.

    Returns:
        [buckets] float64; 0 where all targets of a bucket are equal, NaN where it is empty.
    """
    check_same_shape(value=value, target=target, mask=mask, bucket=bucket)
    check_mask(mask)
    place = torch.where(mask, bucket, buckets).flatten()  # what does not count has a bucket of its own, cut off below
    r = torch.where(mask, target.detach(), 0.0).double().flatten()
    error = r - torch.where(mask, value.detach(), 0.0).double().flatten()
    zeros = r.new_zeros(buckets + 1)
    count = zeros.index_add(0, place, torch.ones_like(r))

    def variance(x: Tensor) -> Tensor:
        centred = x - (zeros.index_add(0, place, x) / count)[place]
        return zeros.index_add(0, place, centred.square()) / count

    low, high = (zeros.scatter_reduce(0, place, r, how, include_self=False) for how in ("amin", "amax"))
    return torch.where((low == high) & (count > 0), 0.0, 1 - variance(error) / variance(r))[:buckets]


def bucket_of(x: Tensor, edges: tuple[int, ...]) -> Tensor:
    """How many of the ascending ``edges`` each entry of ``x`` has reached, int64, the same shape."""
    return torch.stack([x >= edge for edge in edges]).sum(0)
