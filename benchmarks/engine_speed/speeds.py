"""Tokens per second of engines that take turns."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from engine_speed.progress import Progress, run_estimate_s
from engine_speed.runners import BASELINE, Runner, run
from engine_speed.workloads import Workload
from vapo_async.config import KVCacheOnUpdate


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and of CPU in this process and the runner's own."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class SpeedRow:
    """Medians over the repeats. Tokens are those that were asked for."""

    model: str
    lengths: str
    concurrency: int
    engine: str
    requests: int
    tokens: int
    tokens_per_s: float
    tokens_per_cpu_s: float
    speedup: float | None
    """tokens_per_s by that of ``generate``; None where that was not run."""
    cpu_speedup: float | None


def speed_rows(
    model: str,
    lengths: str,
    concurrency: int,
    runners: Mapping[str, Runner],
    work: Workload,
    repeats: int,
    progress: Progress,
) -> Iterator[SpeedRow]:
    """One row for each engine."""
    took: dict[str, list[Took]] = {engine: [] for engine in runners}
    for _ in range(repeats):
        for engine, runner in runners.items():
            took[engine].append(timed_run(runner, work))
            progress.done(
                f"{model}, {concurrency} in flight, {lengths}, {engine}: "
                f"{work.tokens / took[engine][-1].wall_s:,.0f} tokens/s",
                run_estimate_s(model, engine, concurrency, work),
            )
    speeds = {engine: work.tokens / median(t.wall_s for t in times) for engine, times in took.items()}
    cpu_speeds = {engine: work.tokens / median(t.cpu_s for t in times) for engine, times in took.items()}
    for engine in runners:
        yield SpeedRow(
            model,
            lengths,
            concurrency,
            engine,
            requests=len(work.lengths),
            tokens=work.tokens,
            tokens_per_s=speeds[engine],
            tokens_per_cpu_s=cpu_speeds[engine],
            speedup=speeds[engine] / speeds[BASELINE] if BASELINE in speeds else None,
            cpu_speedup=cpu_speeds[engine] / cpu_speeds[BASELINE] if BASELINE in speeds else None,
        )


def timed_run(
    runner: Runner,
    work: Workload,
    on_update: KVCacheOnUpdate = KVCacheOnUpdate.keep,
    at_first_end: Callable[[], None] | None = None,
) -> Took:
    """:func:`run` by the clocks."""
    wall_s, cpu_s = time.perf_counter(), _cpu_s(runner)
    run(runner, work, on_update, at_first_end)
    return Took(time.perf_counter() - wall_s, _cpu_s(runner) - cpu_s)


def _cpu_s(runner: Runner) -> float:
    """Other processes' comes in hundredths."""
    others = [process.cpu_times() for process in runner.processes]
    return time.process_time() + sum(times.user + times.system for times in others)
