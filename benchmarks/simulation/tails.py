"""Heavy tails: what a lead below the bound buys, G = 1 and a learner that takes no time."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simulation.demands import Check
from vapo_async.simulation.cluster import BatchSizes, Cluster, Lengths, Rollout
from vapo_async.simulation.run import simulate

LEAST_SPEED, MOST_AGE = 0.95, 2.1
PAIRS = ((0, 0), (2, 2), (8, 8), (8, 2), (8, 1))
UNIT = 1000
"""Tokens of the median response, decoded in one time unit."""
UNLIMITED, QUEUED, AS_FREE = "unlimited", "2·B slots, queued", "2·B slots, as free"
"""Concurrency. *queued*: every ticket is taken at once and waits for a slot; *as free*: one for each free slot."""


@dataclass(frozen=True)
class Tail:
    """One pair under one concurrency: medians over the seeds. ``speed`` is by that of S = L = 8, seed by seed."""

    groups: int
    sigma: float
    concurrency: str
    max_staleness: int
    lead: int
    time_units: float
    mean_age: float
    max_age: int
    speed: float
    least_speed: float
    most_speed: float


def heavy(groups: int, sigma: float, concurrency: str) -> Cluster:
    """One engine; latencies are log-normal with median 1."""
    slots = None if concurrency == UNLIMITED else 2 * groups
    ask_ahead = 8.0 if concurrency == QUEUED else 0.0
    rollout = Rollout(workers=1, slots=slots, tokens_per_s_alone=UNIT, ask_ahead=ask_ahead)
    return Cluster(concurrency, BatchSizes(groups), Lengths(median_tokens=UNIT, sigma=sigma), rollout)


def tails(
    cases: Sequence[tuple[int, float, int]], versions: int, tell: Callable[[str], None]
) -> tuple[list[Tail], list[Check]]:
    """(c) For every (B, sigma, seeds) the five pairs under three kinds of concurrency."""
    rows, checks = [], []
    for groups, sigma, seeds in cases:
        for concurrency in (UNLIMITED, QUEUED, AS_FREE):
            found = _pairs(groups, sigma, concurrency, seeds, versions)
            rows += found
            ours = next(row for row in found if (row.max_staleness, row.lead) == (8, 2))
            where = f"B = {groups}, σ = {sigma}, {concurrency}"
            tell(f"{where}: S = 8, L = 2 at {ours.speed:.3f} of S = L = 8, mean age {ours.mean_age:.2f}")
            if sigma == 1.5 and concurrency != AS_FREE:
                demanded = f"demanded >= {LEAST_SPEED} at <= {MOST_AGE}"
                text = f"{where}: S = 8, L = 2 has {ours.speed:.3f} of the throughput of S = L = 8"
                holds = ours.speed >= LEAST_SPEED and ours.mean_age <= MOST_AGE
                checks.append(Check(f"{text} at a mean age of {ours.mean_age:.2f} ({demanded})", holds))
    return rows, checks


def _pairs(groups: int, sigma: float, concurrency: str, seeds: int, versions: int) -> list[Tail]:
    cluster = heavy(groups, sigma, concurrency)
    runs = {pair: [simulate(cluster, *pair, versions=versions, seed=seed) for seed in range(seeds)] for pair in PAIRS}
    rows = []
    for (bound, lead), outcomes in runs.items():
        speeds = [large.wall_s / this.wall_s for large, this in zip(runs[8, 8], outcomes, strict=True)]
        rows.append(
            Tail(
                groups,
                sigma,
                concurrency,
                bound,
                lead,
                statistics.median(run.wall_s for run in outcomes),
                statistics.median(run.mean_age for run in outcomes),
                max(run.max_age for run in outcomes),
                statistics.median(speeds),
                min(speeds),
                max(speeds),
            )
        )
    return rows


def table(rows: Sequence[Tail]) -> str:
    """Time units (mean age) of each pair, and the speed of S = 8, L = 2 by that of S = L = 8."""
    names = {(0, 0): "S = L = 0", (2, 2): "S = L = 2", (8, 8): "S = L = 8", (8, 2): "S 8, L 2", (8, 1): "S 8, L 1"}
    head = "".join(f"{names[pair]:>16}" for pair in PAIRS)
    lines = [f"{'time units (mean age)':<40}{head}   S 8, L 2 by S = L = 8"]
    for where in dict.fromkeys((row.groups, row.sigma, row.concurrency) for row in rows):
        these = {(r.max_staleness, r.lead): r for r in rows if (r.groups, r.sigma, r.concurrency) == where}
        cells = "".join(f"{f'{these[p].time_units:,.0f} ({these[p].mean_age:.1f})':>16}" for p in PAIRS)
        ours = these[8, 2]
        spread = f"{ours.speed:.3f} ({ours.least_speed:.2f} to {ours.most_speed:.2f})"
        lines.append(f"{f'B {where[0]}, σ {where[1]}, {where[2]}':<40}{cells}   {spread}")
    return "\n".join(lines)
