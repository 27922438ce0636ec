"""What the flow has to reach at scale, and beside a learner that takes as long as generation."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from vapo_async.simulation.cluster import BatchSizes, Cluster, Learner, Lengths, Publication, Rollout
from vapo_async.simulation.lengths import mean_length
from vapo_async.simulation.run import simulate

LEAST_SCALING, LEAST_OVERLAP = 0.95, 0.95
LENGTHS = Lengths(median_tokens=1000, sigma=0.8, max_tokens=8000, prompt_tokens=200)
TOKENS_PER_S = 50.0


@dataclass(frozen=True)
class Check:
    """A demand and whether it holds."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Scale:
    """One number of workers: medians over the seeds."""

    workers: int
    groups_per_s_per_worker: float
    least: float
    most: float
    mean_age: float
    slots_free: float
    learner_idle: float
    tokens_wasted: float
    failures: int
    buffer_us: float


@dataclass(frozen=True)
class Overlap:
    """One pair S, L with stages that take equally long: medians over the seeds."""

    max_staleness: int
    lead: int
    overlap: float
    """max(generation alone, learning alone) / wall time."""
    least: float
    most: float
    mean_age: float
    slots_free: float
    learner_idle: float


def scaled(workers: int) -> Cluster:
    """Batch and learner grow with the workers, whose slots a batch fills 4 times; the learner needs 0.8 of generation.

    The weights take longer with every doubling, each worker fails once an hour and is back after a minute.
    """
    slots, group_size = 4, 16
    batch_s = group_size * mean_length(LENGTHS) / (slots * TOKENS_PER_S)
    return Cluster(
        f"{workers} workers",
        BatchSizes(groups=workers, group_size=group_size),
        LENGTHS,
        Rollout(
            workers=workers,
            slots=slots,
            tokens_per_s_alone=TOKENS_PER_S,
            prefill_tokens_per_s=20_000,
            mtbf_s=3600,
            restart_s=60,
        ),
        Publication(transfer_s=0.5, transfer_doubling_s=0.1, stall_s=0.5, recompute_kv=True),
        Learner(fixed_s=0.8 * batch_s),
    )


def scaling(
    workers: Sequence[int], versions: int, warm_up: int, seeds: int, tell: Callable[[str], None]
) -> tuple[list[Scale], list[Check]]:
    """(a) Weak scaling at S = 4, L = 2."""
    found = []
    for count in workers:
        cluster = scaled(count)
        runs = [simulate(cluster, 4, 2, versions=versions, warm_up=warm_up, seed=seed) for seed in range(seeds)]
        speeds = [run.groups_per_s / count for run in runs]
        found.append(
            Scale(
                count,
                statistics.median(speeds),
                min(speeds),
                max(speeds),
                statistics.median(run.mean_age for run in runs),
                statistics.median(run.slots_free or 0.0 for run in runs),
                statistics.median(run.learner_idle for run in runs),
                statistics.median(run.tokens_wasted for run in runs),
                sum(sum(run.refunds.values()) for run in runs),
                statistics.median(run.buffer_us for run in runs),
            )
        )
        tell(f"{count} workers: {found[-1].groups_per_s_per_worker:.4f} groups/s each")
    by_workers = {scale.workers: scale for scale in found}
    checks = []
    if 64 in by_workers and max(by_workers) > 64:
        most = max(by_workers)
        share = by_workers[most].groups_per_s_per_worker / by_workers[64].groups_per_s_per_worker
        text = f"throughput of a worker among {most:,} by that among 64: {share:.3f} (demanded >= {LEAST_SCALING})"
        checks.append(Check(text, share >= LEAST_SCALING))
    return found, checks


def balanced() -> tuple[Cluster, float]:
    """A cluster whose batch fills the slots 8 times, and how long all slots together take for one."""
    lengths = replace(LENGTHS, prompt_tokens=0)
    rollout = Rollout(workers=4, slots=16, tokens_per_s_alone=TOKENS_PER_S)
    sizes = BatchSizes(groups=64, group_size=8)
    seconds = sizes.groups * sizes.group_size * mean_length(lengths) / (4 * 16 * TOKENS_PER_S)
    return Cluster("balanced", sizes, lengths, rollout), seconds


def overlaps(
    pairs: Sequence[tuple[int, int]], versions: int, seeds: int, tell: Callable[[str], None]
) -> tuple[list[Overlap], list[Check]]:
    """(b) Wall time against the longer one of both stages, each of which has also run alone."""
    cluster, batch_s = balanced()
    found, checks = [], []
    for bound, lead in pairs:
        shares, runs = [], []
        for seed in range(seeds):
            alone = simulate(cluster, bound, lead, versions=versions, seed=seed)
            both = simulate(replace(cluster, learner=Learner(batch_s)), bound, lead, versions=versions, seed=seed)
            shares.append(max(alone.wall_s, both.learning_s) / both.wall_s)
            runs.append(both)
        found.append(
            Overlap(
                bound,
                lead,
                statistics.median(shares),
                min(shares),
                max(shares),
                statistics.median(run.mean_age for run in runs),
                statistics.median(run.slots_free or 0.0 for run in runs),
                statistics.median(run.learner_idle for run in runs),
            )
        )
        share = found[-1].overlap
        tell(f"S {bound}, L {lead}: overlap {share:.3f}")
        if lead >= 2:
            text = f"S = {bound}, L = {lead}: the longer stage alone takes {share:.3f} of the wall time"
            checks.append(Check(f"{text} (demanded >= {LEAST_OVERLAP})", share >= LEAST_OVERLAP))
    return found, checks


def table(rows: Sequence[Scale | Overlap]) -> str:
    """All fields as text."""
    cells = [[name.replace("_", " ") for name in asdict(rows[0])]]
    cells += [[f"{value:,.4g}" for value in asdict(row).values()] for row in rows]
    widths = [max(len(text) for text in column) + 3 for column in zip(*cells, strict=True)]
    return "\n".join("".join(f"{text:>{n}}" for text, n in zip(line, widths, strict=True)) for line in cells)
