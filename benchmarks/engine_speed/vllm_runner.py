"""vLLM as ``engine=vllm`` runs it. Importing this imports vLLM: :func:`prepare_vllm` comes first."""

import time
from collections.abc import Mapping

import psutil
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from engine_speed.runners import Setting, UpdateTimes
from engine_speed.workloads import Workload
from vapo_async.collector.vllm_process import VLLMProcess
from vapo_async.collector.vllm_settings import engine_args
from vapo_async.config import KVCacheOnUpdate, VLLMEngineConfig
from vapo_async.weights.shared_memory import shared
from vapo_async.weights.vllm_plugin import SHARED_MEMORY

GPU_SHARE = 0.6
"""Of a GPU's memory: the benchmark's own process has a context there too."""


class VLLMRunner:
    """The process below ``VLLMEngine``, whose end token could be sampled: vLLM refuses one outside the vocabulary."""

    def __init__(self, setting: Setting, device: str = "cpu") -> None:
        config = VLLMEngineConfig(max_slots=setting.concurrency, device=device, gpu_memory_utilization=GPU_SHARE)
        dtype = "float32" if device == "cpu" else "bfloat16"
        args = engine_args(
            setting.folder, config, dtype=dtype, max_length=setting.max_length, seed=0, backend=SHARED_MEMORY
        )
        before = psutil.Process().children(recursive=True)
        self._process = VLLMProcess(args, version=0)
        now = psutil.Process().children(recursive=True)
        self.processes = tuple(child for child in now if child not in before)
        self._version = 0
        self._workloads = 0

    def start(self, work: Workload, on_update: KVCacheOnUpdate) -> None:
        self._recompute = on_update is KVCacheOnUpdate.recompute
        self._workloads += 1
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            params = SamplingParams(
                temperature=1.0,
                max_tokens=length,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._process.start(f"{self._workloads}/{i}", prompt, params, cache_salt=str(self._version))

    def advance(self) -> list[tuple[int, int]]:
        self._process.wait()
        return [(int(name.split("/")[1]), len(output.log_probs)) for name, output in self._process.ended()]

    def update(self, weights: Mapping[str, Tensor]) -> UpdateTimes:
        self._version += 1
        called = time.perf_counter()
        with shared(weights) as path:
            written = time.perf_counter()
            self._process.load({"path": path}, self._version, clear_cache=self._recompute)
            loaded = time.perf_counter()
        return UpdateTimes(self._process.last_pause_s, loaded - written, loaded - called)

    def close(self) -> None:
        self._process.close()
