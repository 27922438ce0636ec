"""TorchRL's replay buffer as a place for ragged groups: each is put in once and drawn once."""

from collections.abc import Sequence

from tensordict import TensorDictBase
from torchrl.data import LazyStackStorage, ReplayBuffer, RoundRobinWriter

from vapo_async.buffer.sampler import ChosenSampler


class GroupStorage:
    """At most ``size`` groups, drawn ``batch`` at a time. Nothing is copied."""

    def __init__(self, size: int, batch: int) -> None:
        self._sampler = ChosenSampler()
        # compilable=True: plain integers for the cursors instead of semaphores shared between processes.
        self._groups = ReplayBuffer(
            storage=LazyStackStorage(size, compilable=True),
            sampler=self._sampler,
            writer=RoundRobinWriter(compilable=True),
            consume_after_n_samples=1,
            batch_size=batch,
        )

    def put(self, group: TensorDictBase) -> int:
        """The slot that it lies in."""
        held = len(self._groups)
        slot = int(self._groups.extend([group]))
        assert len(self._groups) == held + 1, f"slot {slot} held an unread group"
        return slot

    def get(self, slot: int) -> TensorDictBase:
        """A look at a group, which stays."""
        group: TensorDictBase = self._groups.storage.get(slot)
        return group

    def draw(self, slots: Sequence[int]) -> tuple[TensorDictBase, ...]:
        """The groups, in this order; their slots are free."""
        self._sampler.choose(slots)
        groups: tuple[TensorDictBase, ...] = self._groups.sample().unbind(0)
        return groups
