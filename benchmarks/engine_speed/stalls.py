"""What a weight update costs generation.

Responses of one length start together; the weights are updated half-way, which the end of one response of half that
length tells. The same run without an update comes in the same round: the difference is what the update costs in all,
keys that are computed anew and cores that it takes included.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from engine_speed.progress import Progress, run_estimate_s
from engine_speed.runners import Runner, UpdatableRunner, UpdateTimes
from engine_speed.speeds import Took, timed_run
from engine_speed.workloads import Workload
from torch import Tensor

from vapo_async.config import KVCacheOnUpdate

STEPS_PER_UPDATE = 100
"""For the share of generation that is lost."""
IMPOSSIBLE = "n/a"
"""``kv_cache`` of an engine that takes weights between two batches only."""


@dataclass(frozen=True)
class StallRow:
    """A weight update under ``concurrency`` responses in flight, medians over the rounds."""

    model: str
    concurrency: int
    engine: str
    kv_cache: str
    """What happens to the keys of the older weights."""
    tokens_in_flight: int
    """Of prompts and responses, when the update comes."""
    decode_step_ms: float
    """Of the run without an update, its prefill included."""
    standstill_ms: float | None = None
    """Nothing is generated. This and all that follows: None where an update is impossible."""
    load_ms: float | None = None
    """The call, with the weights where the engine reads them."""
    call_ms: float | None = None
    """The whole call, with the time that it takes to bring the weights there."""
    lost_ms: float | None = None
    """By which the run took longer than without an update."""
    lost_cpu_ms: float | None = None
    standstill_percent: float | None = None
    """Of generation, at one update for every 100 decode steps."""
    lost_percent: float | None = None
    """Likewise."""


@dataclass(frozen=True)
class _Round:
    """A run with an update, and the one without in the same round."""

    without: Took
    updated: Took
    times: UpdateTimes


def stall_rows(
    model: str,
    concurrency: int,
    runners: Mapping[str, Runner],
    work: Workload,
    rounds: int,
    weights: Mapping[str, Tensor],
    progress: Progress,
) -> Iterator[StallRow]:
    """One row for each engine and each thing that it can do with its KV cache."""
    without: dict[str, list[Took]] = {engine: [] for engine in runners}
    measured: dict[str, dict[KVCacheOnUpdate, list[_Round]]] = {engine: {} for engine in runners}
    for _ in range(rounds):
        for engine, runner in runners.items():
            what, estimate_s = f"{model}, {concurrency} in flight", run_estimate_s(model, engine, concurrency, work)
            without[engine].append(timed_run(runner, work))
            progress.done(f"{what}, no update, {engine}: {without[engine][-1].wall_s:,.2f} s", estimate_s)
            for kv_cache in kinds_of_update(runner):
                found = _round(runner, work, kv_cache, weights, without[engine][-1])
                measured[engine].setdefault(kv_cache, []).append(found)
                progress.done(
                    f"{what}, update ({kv_cache.value}), {engine}: {found.updated.wall_s:,.2f} s, "
                    f"of which {1000 * found.times.standstill_s:,.0f} ms at a standstill",
                    estimate_s,
                )
    held = sum(len(prompt) for prompt in work.prompts) + len(work.prompts) * min(work.lengths)
    for engine in runners:
        step_ms = 1000 * median(took.wall_s for took in without[engine]) / max(work.lengths)
        if not measured[engine]:
            yield StallRow(model, concurrency, engine, IMPOSSIBLE, held, step_ms)
        for kv_cache, found_rounds in measured[engine].items():
            yield StallRow(model, concurrency, engine, kv_cache.value, held, step_ms, *_medians(found_rounds, step_ms))


def kinds_of_update(runner: Runner) -> tuple[KVCacheOnUpdate, ...]:
    """None, if it takes no weights under responses in flight."""
    return runner.kv_cache if isinstance(runner, UpdatableRunner) else ()


def _round(
    runner: Runner, work: Workload, kv_cache: KVCacheOnUpdate, weights: Mapping[str, Tensor], without: Took
) -> _Round:
    assert isinstance(runner, UpdatableRunner)
    times: list[UpdateTimes] = []
    updated = timed_run(runner, work, kv_cache, lambda: times.append(runner.update(weights)))
    return _Round(without, updated, times[0])


def _medians(rounds: list[_Round], step_ms: float) -> tuple[float, ...]:
    """From ``standstill_ms`` on."""
    standstill_ms = 1000 * median(r.times.standstill_s for r in rounds)
    lost_ms = 1000 * median(r.updated.wall_s - r.without.wall_s for r in rounds)
    return (
        standstill_ms,
        1000 * median(r.times.load_s for r in rounds),
        1000 * median(r.times.call_s for r in rounds),
        lost_ms,
        1000 * median(r.updated.cpu_s - r.without.cpu_s for r in rounds),
        _percent(standstill_ms, step_ms),
        _percent(lost_ms, step_ms),
    )


def _percent(lost_ms: float, step_ms: float) -> float:
    return 100 * lost_ms / (STEPS_PER_UPDATE * step_ms + lost_ms)
