"""Takes weights inside vLLM's processes: from a file in memory, between two of the engine's iterations."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """There is nothing to agree on."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are."""

    path: str
    """A safetensors file with all parameters by their Hugging Face names, tied ones once."""


class SharedMemoryReceiver(WeightTransferEngine[NoInitInfo, FileUpdateInfo]):
    """See :mod:`vapo_async.weights.shared_memory`."""

    init_info_cls = NoInitInfo
    update_info_cls = FileUpdateInfo

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._parameters = {name for name, _ in model.named_parameters()}  # tied ones once; an update unties them

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Parameters become loadable again."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Loads every parameter.

        Raises:
            ValueError: the file lacks a parameter of the model, or has one that the model has not.
        """
        with safe_open(update_info.path, "pt") as file:
            model: Any = self.model
            loaded = model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        missing = sorted(self._parameters - loaded) if loaded is not None else []
        if missing:
            raise ValueError(f"published weights lack {len(missing)} of the engine's parameters: {missing[:3]}")

    def finish_weight_update(self) -> None:
        """Parameters are in the layout that the kernels read."""
        finalize_layerwise_reload(self.model, self.model_config)
        mend_tied_embeddings(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def mend_tied_embeddings(model: nn.Module) -> None:
    """An output layer tied to the embedding keeps a packed copy on the CPU, which a reload leaves as it was."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, VocabParallelEmbedding) and method is not None:
            method.process_weights_after_loading(module)
