"""The learner's end of broadcasts, by the device of its policy."""

from typing import Protocol

from torch import nn

from vapo_async.weights.broadcast import Group
from vapo_async.weights.gloo import GlooSender


class Sender(Protocol):
    """Rank 0 of the group."""

    def join(self, group: Group) -> None:
        """Leaves the group before it, if there is one, and waits for all members of the new one."""
        ...

    def send(self) -> None:
        """All parameters, to whoever is in the group; returns when they have gone out."""
        ...


def build_sender(policy: nn.Module) -> Sender:
    """gloo between CPUs, NCCL between GPUs."""
    if next(policy.parameters()).device.type == "cpu":
        return GlooSender(policy)
    from vapo_async.weights.nccl import NCCLSender  # imports vLLM

    return NCCLSender(policy)
