"""What a weight update costs generation.

Responses of one length start together; the weights are updated half-way, which the end of one response of half that
length tells. The same run without an update comes in the same round: the difference is what the update costs in all,
keys that are computed anew and cores that it takes included.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from engine_speed.progress import Progress, run_estimate_s
from engine_speed.runners import ENGINES, Runner, UpdatableRunner, UpdateTimes
from engine_speed.speeds import Took, timed_run
from engine_speed.workloads import Workload
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
class _Run:
    """One run; ``times`` of its update."""

    took: Took
    times: UpdateTimes | None


_Runs = dict[KVCacheOnUpdate | None, list[_Run]]
"""By what happened to the KV cache, None: no update; one entry for each round."""


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
    runs: dict[str, _Runs] = {name: {kind: [] for kind in (None, *ENGINES[name].kv_cache)} for name in runners}
    for i in range(rounds):
        for engine, runner in runners.items():
            for kind in list(runs[engine])[:: -1 if i % 2 else 1]:  # none is always the first after another engine
                runs[engine][kind].append(_run(runner, work, kind, weights))
                progress.done(
                    f"{model}, {concurrency} in flight, {engine}, {_told(kind, runs[engine][kind][-1])}",
                    run_estimate_s(model, engine, concurrency, work),
                )
    held = sum(len(prompt) for prompt in work.prompts) + len(work.prompts) * min(work.lengths)
    for engine, of_engine in runs.items():
        without = of_engine.pop(None)
        step_ms = 1000 * median(run.took.wall_s for run in without) / max(work.lengths)
        if not of_engine:
            yield StallRow(model, concurrency, engine, IMPOSSIBLE, held, step_ms)
        for kind, updated in of_engine.items():
            assert kind is not None
            medians = _medians(without, updated, step_ms)
            yield StallRow(model, concurrency, engine, kind.value, held, step_ms, *medians)


def _run(runner: Runner, work: Workload, kind: KVCacheOnUpdate | None, weights: Mapping[str, Tensor]) -> _Run:
    if kind is None:
        return _Run(timed_run(runner, work), None)
    assert isinstance(runner, UpdatableRunner)
    times: list[UpdateTimes] = []
    took = timed_run(runner, work, kind, lambda: times.append(runner.update(weights)))
    return _Run(took, times[0])


def _told(kind: KVCacheOnUpdate | None, run: _Run) -> str:
    if kind is None or run.times is None:
        return f"no update: {run.took.wall_s:,.2f} s"
    still_ms = 1000 * run.times.standstill_s
    return f"update ({kind.value}): {run.took.wall_s:,.2f} s, of which {still_ms:,.0f} ms at a standstill"


def _medians(without: list[_Run], updated: list[_Run], step_ms: float) -> tuple[float, ...]:
    """From ``standstill_ms`` on; runs of one round are compared with each other."""
    times = [run.times for run in updated if run.times is not None]
    pairs = list(zip(without, updated, strict=True))
    standstill_ms = 1000 * median(t.standstill_s for t in times)
    lost_ms = 1000 * median(new.took.wall_s - old.took.wall_s for old, new in pairs)
    return (
        standstill_ms,
        1000 * median(t.load_s for t in times),
        1000 * median(t.call_s for t in times),
        lost_ms,
        1000 * median(new.took.cpu_s - old.took.cpu_s for old, new in pairs),
        _percent(standstill_ms, step_ms),
        _percent(lost_ms, step_ms),
    )


def _percent(lost_ms: float, step_ms: float) -> float:
    return 100 * lost_ms / (STEPS_PER_UPDATE * step_ms + lost_ms)
