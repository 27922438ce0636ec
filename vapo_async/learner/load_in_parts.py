"""A model of which every rank holds its part of each parameter from the start: ZeRO-3 (arXiv 1910.02054, section 5)."""

from pathlib import Path

import deepspeed
import torch
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vapo_async.config import ConfigError, DeepSpeedLearnerConfig
from vapo_async.learner.backend_deepspeed import settings_of, whole_shape
from vapo_async.learner.tensor_files import TensorFiles

_FREQUENCIES = "inv_freq"


@torch.no_grad()
def load_in_parts(
    folder: Path, dtype_name: str, config: DeepSpeedLearnerConfig, *, decoder_only: bool = False
) -> PreTrainedModel:
    """A causal language model of which this rank never holds more than its part and one whole parameter.

    For stage 3. All ranks call it.

    Args:
        folder: Hugging Face's, with safetensors whose names are those of the model's parameters.
        dtype_name: of the parameters.
        config: of the backends that the model goes to.
        decoder_only: the output embedding is not of use, and need not be there: the folder may be a reward model's.

    Raises:
        ConfigError: a parameter is not in the folder, or has another shape there; or the model has buffers that are
            neither in the folder nor frequencies of rotary embeddings.
    """
    dtype: torch.dtype = getattr(torch, dtype_name)
    settings = AutoConfig.from_pretrained(folder)
    # Initialising weights would index some of them, which are in parts; tied ones are tied after it.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings_of(config, None, dtype), dtype=dtype):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    _make_buffers_again(model, folder)
    part = model.get_decoder() if decoder_only else model
    wanted = {id(p) for p in part.parameters()}
    named = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    with TensorFiles(folder, "model") as tensors:
        found = tensors.shapes()
        for name, p in named.items():
            if found.get(name) != list(whole_shape(p)):
                raise ConfigError(
                    f"{folder}: {name} is {found.get(name, 'missing')}, expected {list(whole_shape(p))}: "
                    "learner.zero_stage=3 needs safetensors with the names of the model's parameters"
                )
        for name, p in named.items():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if distributed.get_rank() == 0:  # the others get it from there
                    p.copy_(tensors[name])
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _make_buffers_again(model: nn.Module, folder: Path) -> None:
    """In float32, as Transformers has them: inside ``zero.Init`` they got the parameters' dtype."""
    for name, module in model.named_modules():
        buffers = {key for key, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}
        if _FREQUENCIES in buffers:
            for key, buffer in type(module)(module.config).named_buffers(recurse=False):
                module.register_buffer(key, buffer, persistent=False)
            buffers = {key for key in buffers if key.removeprefix("original_") != _FREQUENCIES}
        if buffers:
            raise ConfigError(
                f"{folder}: {name}.{min(buffers)} is a buffer that learner.zero_stage=3 cannot load: "
                "use learner.zero_stage=2"
            )
