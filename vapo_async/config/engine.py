"""What generates responses, and how weights get into it."""

from dataclasses import dataclass
from enum import Enum


class KVCacheOnUpdate(Enum):
    """What a weight swap does to the keys and values of the responses in flight."""

    keep = "keep"  # old keys stay: cheap; log-probs are of that mixed policy, which is what was sampled from
    recompute = "recompute"  # prefill again with the new weights


class WeightTransport(Enum):
    """How published weights get into vLLM's processes."""

    shared_memory = "shared_memory"  # through Ray's object store, and a file in memory on the engine's node
    broadcast = "broadcast"  # from the learner to all engines at once: NCCL between GPUs, gloo between CPUs


@dataclass
class EngineConfig:
    """What generates responses."""

    temperature: float = 1.0
    """Sampling temperature; the learner applies the same."""
    top_p: float = 1.0
    """Must be 1: the stored log-prob has to be of the distribution sampled from, which the learner cannot rebuild."""
    kv_cache_on_update: KVCacheOnUpdate = KVCacheOnUpdate.recompute
    device: str = "cpu"
    """Where the engine's model lives: ``cpu`` or ``cuda``."""
    max_slots: int = 128
    """Responses decoded together."""
    max_mismatch: float | None = None
    """Mean difference in nats between engine's and learner's log-probs, of the policy that a run starts with and of the
    first one published; more stops the run. null = 0.002 where both compute in float32, else 0.1."""


@dataclass
class TransformersEngineConfig(EngineConfig):
    """Continuous batching over a Transformers model, in the process itself."""


@dataclass
class VLLMEngineConfig(EngineConfig):
    """vLLM in a process of its own, or one for each GPU that it spreads over."""

    dtype: str | None = None
    """Of the engine's weights, ``float32``, ``bfloat16`` or ``float16``; null = ``model.dtype``."""
    tensor_parallel_size: int = 1
    """GPUs that one engine spreads its model over."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_mb: int | None = None
    """MiB of the KV cache; null = all slots at full length (CPU), what ``gpu_memory_utilization`` leaves (GPU)."""
    enforce_eager: bool = False
    """Does without compiled graphs: quicker to start, slower on GPUs. The CPU has none."""
    weight_transport: WeightTransport = WeightTransport.shared_memory
