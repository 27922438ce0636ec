"""vLLM's arguments from the engine's configuration."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from vapo_async.collector.vllm_worker import WorkerExtension
from vapo_async.config import VLLMEngineConfig

BLOCK_TOKENS = 32
"""Tokens of a block of the KV cache on the CPU, whose kernels want a multiple of 32; samples of one prompt share whole
blocks. On GPUs vLLM chooses."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def engine_args(
    model: Path, config: VLLMEngineConfig, *, dtype: str, max_length: int, seed: int, backend: str
) -> AsyncEngineArgs:
    """Args:
    model: a Hugging Face folder; its tokenizer is not read.
    config: of the engine.
    dtype: of weights and KV cache.
    max_length: tokens of prompt and response together.
    seed: of the sampling generators, below 2^32.
    backend: of the weight transfer.
    """
    args = AsyncEngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        generation_config="vllm",  # nothing of the model folder's own sampling settings
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=max_length,
        max_num_seqs=config.max_slots,
        seed=seed,
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
        enable_prefix_caching=True,  # the samples of a prompt share its keys
        weight_transfer_config=WeightTransferConfig(backend=backend),
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        tensor_parallel_size=config.tensor_parallel_size,
        enforce_eager=config.enforce_eager or config.device == "cpu",
        use_tqdm_on_load=False,
        disable_log_stats=True,
        enable_log_requests=False,
    )
    if config.kv_cache_mb is not None:
        args.kv_cache_memory_bytes = config.kv_cache_mb << 20
    if config.device == "cpu":
        args.block_size = BLOCK_TOKENS
        if config.kv_cache_mb is None:
            args.kv_cache_memory_bytes = full_cache_bytes(model, config.max_slots, max_length, dtype)
    else:
        args.gpu_memory_utilization = config.gpu_memory_utilization
    return args


def parameter_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Of a Hugging Face folder's model by the names that are published, tied ones once; its weights are not read."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}


def full_cache_bytes(model: Path, slots: int, max_length: int, dtype: str) -> int:
    """Of a KV cache that holds ``slots`` responses at full length; one slot more, as vLLM keeps a block for itself."""
    shape = AutoConfig.from_pretrained(model).get_text_config()
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    token_bytes = 2 * shape.num_hidden_layers * heads * head * _BYTES[dtype]
    blocks = -(-max_length // BLOCK_TOKENS) * (slots + 1)
    return int(blocks * BLOCK_TOKENS * token_bytes)
