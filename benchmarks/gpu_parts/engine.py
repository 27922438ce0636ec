"""Tokens per second of an engine with long-tailed responses, and what a weight update costs it.

On a GPU it is vLLM as ``engine=vllm`` runs it, in bfloat16; on the CPU, where vLLM takes half a minute to start, it is
``engine=transformers``. Workloads, runs and what is measured of an update are ``benchmarks/engines.py``'s. New weights
come through a file in memory (``engine.weight_transport=shared_memory``): a broadcast wants a GPU for the learner too.
"""

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import median
from typing import Final

import torch
from engine_speed.runners import ENGINES, KEEP, RECOMPUTE, Setting, UpdatableRunner, UpdateTimes
from engine_speed.speeds import timed_run
from engine_speed.workloads import LONG_TAILED, Sizes, make_workload, update_workload
from torch import Tensor

from gpu_parts.sections import Line, Report, Task
from gpu_parts.training import FULL as FULL_TRAINING
from gpu_parts.training import QUICK as QUICK_TRAINING
from gpu_parts.training import model_folder
from vapo_async.collector.vllm_environment import prepare_vllm
from vapo_async.config import KVCacheOnUpdate
from vapo_async.models.load import load_policy
from vapo_async.weights.mailbox import published_tensors

FULL: Final = Sizes((256,), 0, 256, 2048, repeats=3, update_tokens=256, update_rounds=3)
QUICK: Final = Sizes((8,), 0, 8, 32, repeats=2, update_tokens=16, update_rounds=2)


@dataclass(frozen=True)
class SpeedRow:
    """Medians. Only tokens that were asked for are written."""

    engine: str
    model: str
    dtype: str
    concurrency: int
    requests: int
    tokens: int
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True)
class UpdateRow:
    """An update half-way through responses of one length, medians; see ``benchmarks/engines.py``."""

    engine: str
    kv_cache: str
    concurrency: int
    standstill_ms: float
    load_ms: float
    call_ms: float
    lost_ms: float
    """By which the run took longer than one without an update."""


def measure(task: Task, report: Report) -> None:
    """Speeds, then updates."""
    torch.set_num_threads(1)  # vLLM's engine has a process of its own
    work, sizes = (QUICK_TRAINING, QUICK) if task.quick else (FULL_TRAINING, FULL)
    (concurrency,) = sizes.concurrency
    folder = model_folder(work.shape, task.scratch)
    name, dtype = ("vllm", "bfloat16") if task.device == "cuda" else ("transformers", "float32")
    policy = load_policy(folder, dtype)
    with closing(make_runner(task.device, Setting(policy, folder, concurrency, sizes.max_length))) as runner:
        timed_run(runner, update_workload(concurrency, sizes))  # does not count
        speed = speed_of(runner, sizes, name, work.shape.name, dtype)
        what = f"{speed.model}, {name}, {dtype}, {concurrency} in flight"
        report(
            Line(what, f"{speed.seconds:,.2f} s", f"{speed.tokens_per_s:,.0f} tokens/s, {LONG_TAILED}", asdict(speed))
        )
        weights = published_tensors(policy)
        for kind in (KEEP, RECOMPUTE):
            row = update_of(runner, sizes, name, kind, weights)
            what = f"a weight update with {concurrency} in flight, KV cache: {row.kv_cache}"
            told = (
                f"at a standstill; load {row.load_ms:,.0f} ms, call {row.call_ms:,.0f} ms, lost {row.lost_ms:,.0f} ms"
            )
            report(Line(what, f"{row.standstill_ms:,.0f} ms", told, asdict(row)))


def speed_of(runner: UpdatableRunner, sizes: Sizes, engine: str, model: str, dtype: str) -> SpeedRow:
    """The same workload, several times."""
    (concurrency,) = sizes.concurrency
    work = make_workload(LONG_TAILED, concurrency, sizes)
    seconds = median(timed_run(runner, work).wall_s for _ in range(sizes.repeats))
    requests, tokens = len(work.lengths), work.tokens
    return SpeedRow(engine, model, dtype, concurrency, requests, tokens, seconds, tokens / seconds)


def update_of(
    runner: UpdatableRunner, sizes: Sizes, engine: str, kind: KVCacheOnUpdate, weights: Mapping[str, Tensor]
) -> UpdateRow:
    """Runs with and without an update in turns."""
    (concurrency,) = sizes.concurrency
    work = update_workload(concurrency, sizes)
    times: list[UpdateTimes] = []
    lost_s = []
    for _ in range(sizes.update_rounds):
        without = timed_run(runner, work)
        updated = timed_run(runner, work, kind, lambda: times.append(runner.update(weights)))
        lost_s.append(updated.wall_s - without.wall_s)
    return UpdateRow(
        engine,
        kind.value,
        concurrency,
        standstill_ms=1e3 * median(t.standstill_s for t in times),
        load_ms=1e3 * median(t.load_s for t in times),
        call_ms=1e3 * median(t.call_s for t in times),
        lost_ms=1e3 * median(lost_s),
    )


def make_runner(device: str, setting: Setting) -> UpdatableRunner:
    """Of :mod:`engine_speed`."""
    if device == "cpu":
        runner = ENGINES["embedded"].make(setting)
    else:
        prepare_vllm(device, torch.get_num_threads())
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # threads of this process do not survive a fork
        from engine_speed.vllm_runner import VLLMRunner  # importing vLLM takes seconds

        runner = VLLMRunner(setting, device)
    assert isinstance(runner, UpdatableRunner)
    return runner
