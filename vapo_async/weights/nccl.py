"""Broadcasts between GPUs, by vLLM's own NCCL backend: the learner's end."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from vapo_async.weights.broadcast import Group, Layout


class NCCLSender:
    """The learner's end: rank 0, on the policy's GPU. The engines' part is started by who calls this, see
    :mod:`vapo_async.launcher.ray_broadcast`.
    """

    def __init__(self, layout: Layout) -> None:
        self._source = _Stream(layout)
        self._end: TrainerWeightTransferEngine[Any] | None = None

    def join(self, group: Group) -> None:
        """Leaves the group before it, if there is one, and waits for all members of the new one."""
        if self._end is not None:
            self._end.shutdown()
        self._end = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(group.host, group.port, group.world_size, rank=0),
            client=_NoClient(),
            source=self._source,
        )

    def send(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """To whoever is in the group; returns when all have gone out."""
        assert self._end is not None, "joined before"
        self._source.parameters = parameters
        self._end.send_weights()


class _Stream(WeightSource):
    """What is sent next, as vLLM's end wants it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.parameters: Iterable[tuple[str, Tensor]] = ()

    def metadata(self) -> list[ParamMeta]:
        of_all = zip(self._layout.names, self._layout.dtypes, self._layout.shapes, strict=True)
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in of_all]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.parameters)


class _NoClient:
    """vLLM's client would call the engines; here each takes its part between two of its own steps."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        pass

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass
