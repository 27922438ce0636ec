"""Ranges and contradictions of ``engine``, and vLLM beside launcher and learner."""

from vapo_async.config.engine import EngineConfig, VLLMEngineConfig, WeightTransport
from vapo_async.config.launcher import RayLauncherConfig
from vapo_async.config.requirements import DTYPES, above, at_least, known_device, require, within
from vapo_async.config.tree import Config


def check_engine(c: EngineConfig) -> None:
    """By itself."""
    above("engine.temperature", c.temperature, 0, "greedy decoding explores nothing; scripts/evaluate.py can do it")
    hint = (
        "the learner cannot rebuild the cut distribution that stored log-probs are of; lower engine.temperature "
        "instead, or set evaluation.top_p for evaluations"
    )
    require(c.top_p == 1, "engine.top_p", c.top_p, "1", hint)
    at_least("engine.max_slots", c.max_slots, 1)
    known_device("engine.device", c.device)
    if c.max_mismatch is not None:
        above("engine.max_mismatch", c.max_mismatch, 0)
    if isinstance(c, VLLMEngineConfig):
        _vllm(c)


def _vllm(c: VLLMEngineConfig) -> None:
    known = c.dtype is None or c.dtype in DTYPES
    require(known, "engine.dtype", c.dtype, f"one of {', '.join(DTYPES)} or null")
    at_least("engine.tensor_parallel_size", c.tensor_parallel_size, 1)
    within("engine.gpu_memory_utilization", c.gpu_memory_utilization, 0.01, 1)
    if c.kv_cache_mb is not None:
        at_least("engine.kv_cache_mb", c.kv_cache_mb, 1)
    if c.device == "cpu":
        hint = "the CPU's engine is one process; launcher.threads_per_worker gives it more cores"
        require(c.tensor_parallel_size == 1, "engine.tensor_parallel_size", c.tensor_parallel_size, "1", hint)
    else:
        hint = "Ray says which GPUs a process sees: leave the number out"
        require(c.device == "cuda", "engine.device", c.device, "cpu or cuda with engine=vllm", hint)


def check_engine_in_place(config: Config) -> None:
    """vLLM beside launcher and learner."""
    if not isinstance(config.engine, VLLMEngineConfig):
        return
    hint = "inline runs are deterministic, and vLLM's scheduler is not; use launcher=ray or engine=transformers"
    require(isinstance(config.launcher, RayLauncherConfig), "launcher", "inline", "ray with engine=vllm", hint)
    if config.engine.weight_transport is WeightTransport.broadcast:
        kinds = {device.partition(":")[0] for device in (config.engine.device, config.learner.device)}
        hint = "one of NCCL (GPUs) and gloo (CPUs) connects them all; or use engine.weight_transport=shared_memory"
        expected = f"the engine's, {config.engine.device}, to broadcast"
        require(len(kinds) == 1, "learner.device", config.learner.device, expected, hint)
    spread = config.engine.tensor_parallel_size
    if spread > 1 and isinstance(config.launcher, RayLauncherConfig):
        share, expected = config.launcher.gpus_per_actor, f"1 with engine.tensor_parallel_size={spread}"
        hint = "it is per GPU of an engine, and one that spreads over several shares none of them"
        require(share == 1, "launcher.gpus_per_actor", share, expected, hint)
