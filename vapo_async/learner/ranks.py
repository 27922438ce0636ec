"""The processes that learn together: who one is, and sums over all of them."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, distributed


class Ranks(Protocol):
    """All call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """From 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum_(self, tensor: Tensor) -> None:
        """In place, over all ranks."""
        ...


class OneRank:
    """A process on its own."""

    rank, size = 0, 1

    def sum_(self, tensor: Tensor) -> None:
        """It is its own sum."""


class TorchRanks:
    """The default group of ``torch.distributed``, which has been initialised.

    Args:
        device: where the group's backend expects tensors: ``cpu`` for gloo, a GPU for NCCL.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._device = device

    def sum_(self, tensor: Tensor) -> None:
        """In place, over all ranks."""
        if self.size == 1:
            return
        there = tensor.to(self._device).contiguous()
        distributed.all_reduce(there)
        tensor.copy_(there)


def summed(sums: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Float64 scalars by name, each summed over all ranks by one reduction. All ranks have the same names."""
    if not sums:
        return {}
    names = sorted(sums)
    total = torch.stack([sums[name].double() for name in names])
    ranks.sum_(total)
    return dict(zip(names, total.unbind(), strict=True))
