"""Takes weights inside vLLM's processes, between two iterations: from a file in memory, or from a broadcast."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from vapo_async.weights.gloo import join


@dataclass
class GroupInfo(WeightTransferInitInfo):
    """Where learner and engines meet; without a host there is nobody to meet."""

    host: str = ""
    port: int = 0
    first_rank: int = 0
    """Of this engine."""
    world_size: int = 0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are: all parameters by their Hugging Face names, tied ones once."""

    path: str = ""
    """A safetensors file; empty: they come by a broadcast, as the other fields say."""
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    """Torch's names."""
    shapes: list[list[int]] = field(default_factory=list)


class FileReceiver(WeightTransferEngine[GroupInfo, UpdateInfo]):
    """From :mod:`vapo_async.weights.shared_memory`."""

    init_info_cls = GroupInfo
    update_info_cls = UpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._parameters = {name for name, _ in model.named_parameters()}  # tied ones once; an update unties them

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """A file needs no connection."""

    def start_weight_update(self) -> None:
        """Parameters become loadable again."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Loads every parameter.

        Raises:
            ValueError: one of the model's is missing, or there is one that the model has not.
        """
        with safe_open(update_info.path, "pt") as file:
            self.load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Into the model; see :meth:`receive_weights`."""
        model: Any = self.model
        loaded = model.load_weights(weights)
        missing = sorted(self._parameters - loaded) if loaded is not None else []
        if missing:
            raise ValueError(f"published weights lack {len(missing)} of the engine's parameters: {missing[:3]}")

    def finish_weight_update(self) -> None:
        """Parameters are in the layout that the kernels read."""
        finalize_layerwise_reload(self.model, self.model_config)
        mend_tied_embeddings(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class BroadcastReceiver(FileReceiver, ABC):
    """From the learner, together with others; an engine that comes late gets its first weights from a file."""

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Leaves the group before it, if there is one, and joins this one, if there is one."""
        if init_info.host:
            self.join(init_info)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """See :meth:`FileReceiver.receive_weights`."""
        if update_info.path:
            super().receive_weights(update_info)
        else:
            self.receive_broadcast(update_info)

    @abstractmethod
    def join(self, info: GroupInfo) -> None:
        """Waits for all members."""

    @abstractmethod
    def receive_broadcast(self, info: UpdateInfo) -> None:
        """Loads what the learner sends."""


class GlooReceiver(BroadcastReceiver):
    """Between CPUs, where an engine is one process."""

    _group: ProcessGroup | None = None

    def join(self, info: GroupInfo) -> None:
        self._group = join(info.host, info.port, info.first_rank, info.world_size)

    def receive_broadcast(self, info: UpdateInfo) -> None:
        self.load(self._received(info))

    def _received(self, info: UpdateInfo) -> Iterator[tuple[str, Tensor]]:
        """In the order in which they are sent."""
        assert self._group is not None, "joined before"
        for name, dtype, shape in zip(info.names, info.dtypes, info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(tensor, 0).wait()
            yield name, tensor

    def shutdown(self) -> None:
        self._group = None


class NCCLReceiver(BroadcastReceiver):
    """Between GPUs, by vLLM's own engine."""

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._nccl = NCCLWeightTransferEngine(config, vllm_config, device, model)

    def join(self, info: GroupInfo) -> None:
        self._nccl.shutdown()
        self._nccl.init_transfer_engine(
            NCCLWeightTransferInitInfo(
                master_address=info.host,
                master_port=info.port,
                rank_offset=info.first_rank,
                world_size=info.world_size,
                packed=True,  # as the learner's end sends
            )
        )

    def receive_broadcast(self, info: UpdateInfo) -> None:
        self._nccl.receive_weights(NCCLWeightTransferUpdateInfo(info.names, info.dtypes, info.shapes))

    def shutdown(self) -> None:
        self._nccl.shutdown()


def mend_tied_embeddings(model: nn.Module) -> None:
    """An output layer tied to the embedding keeps a packed copy on the CPU, which a reload leaves as it was."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, VocabParallelEmbedding) and method is not None:
            method.process_weights_after_loading(module)
