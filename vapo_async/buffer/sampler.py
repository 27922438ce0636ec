"""Draws the entries that it is told to draw, each of them once, at a cost that does not grow with the storage."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchrl.data import ConsumingSampler
from torchrl.data.replay_buffers.storages import Storage


class ChosenSampler(ConsumingSampler):
    """TorchRL's consume-once sampler with the choice made by the caller.

    ``ReplayBuffer`` reuses the slots that a ``ConsumingSampler`` has freed before it moves its own cursor, so a buffer
    whose capacity covers all live entries never overwrites unread data. Call :meth:`choose` right before ``sample``.

    ``ConsumingSampler`` itself goes over masks of the storage's length on every write and every sample; here are a set
    and a queue instead, behind the methods that ``ReplayBuffer`` calls.
    """

    def __init__(self) -> None:
        super().__init__(max_sample_count=1)
        self._chosen: list[int] = []
        self._live: set[int] = set()
        self._free: deque[int] = deque()

    def choose(self, slots: Sequence[int]) -> None:
        """The storage indices that the next ``sample(len(slots))`` returns, in this order."""
        self._chosen = list(slots)

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Hands out the chosen slots and frees them."""
        slots, self._chosen = self._chosen, []
        assert len(slots) == batch_size, f"{len(slots)} slots chosen, {batch_size} asked for"
        assert self._live.issuperset(slots), "a slot was chosen that is empty or consumed"
        self._live.difference_update(slots)
        self._free.extend(slots)
        return torch.tensor(slots, dtype=torch.long), {}

    def _mark_indices_live(self, index: int | Tensor | tuple[Any, ...]) -> None:
        self._live.update(torch.as_tensor(index).reshape(-1).tolist())

    def mark_update(self, index: int | Tensor | tuple[Any, ...], *, storage: Storage | None = None) -> None:
        """Called by the storage on every write."""
        self._mark_indices_live(index)

    def _pop_consumed_indices(self, storage: Storage | None = None, max_count: int | None = None) -> Tensor:
        count = len(self._free) if max_count is None else min(max_count, len(self._free))
        return torch.tensor([self._free.popleft() for _ in range(count)], dtype=torch.long)

    def _num_sampleable(self, storage: Storage | None = None) -> int:
        return len(self._live)
