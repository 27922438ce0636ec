"""Broadcasts between GPUs, by vLLM's own NCCL backend: the learner's end."""

from typing import Any

from torch import nn
from vllm.distributed.weight_transfer.base import ModuleSource, TrainerWeightTransferEngine, WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from vapo_async.weights.broadcast import Group


class NCCLSender:
    """The learner's end: rank 0, on the policy's GPU. The engines' part is started by who calls this, see
    :mod:`vapo_async.launcher.ray_broadcast`.
    """

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self._end: TrainerWeightTransferEngine[Any] | None = None

    def join(self, group: Group) -> None:
        """Leaves the group before it, if there is one, and waits for all members of the new one."""
        if self._end is not None:
            self._end.shutdown()
        self._end = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(group.host, group.port, group.world_size, rank=0),
            client=_NoClient(),
            source=ModuleSource(self._policy),
        )

    def send(self) -> None:
        """All parameters, to whoever is in the group; returns when they have gone out."""
        assert self._end is not None, "joined before"
        self._end.send_weights()


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
