"""Memory of one process of a generation engine, by component, and what is left for its KV cache. Bytes throughout."""

from dataclasses import dataclass
from typing import Final

from vapo_async.planning.memory import FLOAT, Memory, Part
from vapo_async.planning.shapes import ModelShape

BATCHED_TOKENS: Final = 16_384
"""Tokens of one step of vLLM's scheduler, prefill included, at most: its own default on large GPUs."""
BLOCK_TOKENS: Final = 32
"""Of the CPU's KV cache."""


@dataclass(frozen=True)
class EngineSizes:
    """What an engine is asked to hold."""

    dtype_bytes: int
    """Of weights and KV cache."""
    slots: int
    """Responses decoded together."""
    max_length: int
    """Tokens of prompt and response together."""
    tensor_parallel: int = 1
    kv_bytes: float | None = None
    """The KV cache's own setting; None: what is left, or all slots at full length."""


@dataclass(frozen=True)
class EngineMemory:
    """One rank of an engine; tokens are of the whole engine."""

    memory: Memory
    kv_tokens: float
    """Tokens that the KV cache holds."""
    full_length: float
    """Responses of the greatest length that fit into it together."""


def vllm_gpu_memory(shape: ModelShape, sizes: EngineSizes, gpu_bytes: float, overhead_bytes: float) -> EngineMemory:
    """vLLM on GPUs: the KV cache takes what is left.

    Args:
        shape: of the policy.
        sizes: of the engine.
        gpu_bytes: what vLLM may take of one GPU: ``gpu_memory_utilization`` of it.
        overhead_bytes: context, communication and graphs, which count as vLLM's.
    """
    fixed = _fixed(shape, sizes)
    used = sum(part.bytes for part in fixed) + overhead_bytes
    return _with_cache(shape, sizes, fixed, max(0.0, gpu_bytes - used) if sizes.kv_bytes is None else sizes.kv_bytes)


def full_cache_memory(shape: ModelShape, sizes: EngineSizes) -> EngineMemory:
    """An engine whose KV cache holds all slots at full length: Transformers anywhere, vLLM on a CPU."""
    blocks = -(-sizes.max_length // BLOCK_TOKENS) * BLOCK_TOKENS
    whole = (sizes.slots + 1) * blocks * shape.kv_bytes_per_token(sizes.dtype_bytes, sizes.tensor_parallel)
    return _with_cache(shape, sizes, _fixed(shape, sizes), whole if sizes.kv_bytes is None else sizes.kv_bytes)


def _fixed(shape: ModelShape, sizes: EngineSizes) -> tuple[Part, ...]:
    e, cut = sizes.dtype_bytes, sizes.tensor_parallel
    tokens = min(BATCHED_TOKENS, sizes.slots * sizes.max_length)
    working = e * tokens * (4 * shape.hidden + 3 * shape.intermediate / cut)
    logits = 3 * FLOAT * sizes.slots * shape.vocabulary  # logits, log-softmax, probabilities
    return Part("weights", e * shape.parameters / cut), Part("activations", working), Part("logits", logits)


def _with_cache(shape: ModelShape, sizes: EngineSizes, fixed: tuple[Part, ...], cache_bytes: float) -> EngineMemory:
    tokens = cache_bytes / shape.kv_bytes_per_token(sizes.dtype_bytes, sizes.tensor_parallel)
    memory = Memory((*fixed, Part("KV cache", cache_bytes)), {"": ()})
    return EngineMemory(memory, tokens, tokens / sizes.max_length)
