"""Broadcasts between CPUs, by torch's gloo: the learner's end, and the group for the engines' ends."""

from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ProcessGroupGloo, TCPStore

from vapo_async.weights.broadcast import Group

TIMEOUT = timedelta(seconds=60)
"""For all to come together, each at most an iteration away, and for one tensor."""


def join(host: str, port: int, rank: int, world_size: int) -> ProcessGroup:
    """A group of its own, beside torch's default one; returns once all are there.

    Raises:
        RuntimeError: somebody did not come within :data:`TIMEOUT`.
    """
    store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=TIMEOUT)
    gloo = ProcessGroupGloo(store, rank, world_size, TIMEOUT)
    group = ProcessGroup(store, rank, world_size)
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, gloo)
    return group


class GlooSender:
    """The learner's end."""

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None

    def join(self, group: Group) -> None:
        """Leaves the group before it, if there is one, and waits for all members of the new one."""
        self._group = None
        self._group = join(group.host, group.port, 0, group.world_size)

    @torch.no_grad()
    def send(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """To whoever is in the group; returns when all have gone out."""
        assert self._group is not None, "joined before"
        group, self._group = self._group, None  # after a failure nobody is to wait for the rest
        for _, parameter in parameters:
            group.broadcast(parameter.contiguous(), 0).wait()
        self._group = group
