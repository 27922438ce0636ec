"""The learner's end of broadcasts, by the device of its policy."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from vapo_async.weights.broadcast import Group, Layout
from vapo_async.weights.gloo import GlooSender


class Sender(Protocol):
    """Rank 0 of the group."""

    def join(self, group: Group) -> None:
        """Leaves the group before it, if there is one, and waits for all members of the new one."""
        ...

    def send(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """To whoever is in the group; returns when all have gone out."""
        ...


def build_sender(device: str, layout: Layout) -> Sender:
    """gloo between CPUs, NCCL between GPUs."""
    if device == "cpu":
        return GlooSender()
    from vapo_async.weights.nccl import NCCLSender  # imports vLLM

    return NCCLSender(layout)
