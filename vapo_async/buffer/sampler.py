"""Draws the entries that it is told to draw, each of them once."""

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
    """

    def __init__(self) -> None:
        super().__init__(max_sample_count=1)
        self._chosen: Tensor = torch.zeros(0, dtype=torch.long)

    def choose(self, slots: Sequence[int]) -> None:
        """The storage indices that the next ``sample(len(slots))`` returns, in this order."""
        self._chosen = torch.tensor(slots, dtype=torch.long)

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Hands out the chosen slots and frees them."""
        self._ensure_state(storage)
        slots, self._chosen = self._chosen, self._chosen[:0]
        assert len(slots) == batch_size, f"{len(slots)} slots chosen, {batch_size} asked for"
        assert bool(self._live_mask[slots].all()), "a slot was chosen that is empty or consumed"
        self._sample_count[slots] += 1
        self._live_mask[slots] = False
        self._append_free_indices(slots)
        self._update_remaining_batches(batch_size, storage)
        return slots, {}
