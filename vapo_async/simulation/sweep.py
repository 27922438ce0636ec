"""Throughput and ages over the (S, L) plane, and which pair to take."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vapo_async.simulation.cluster import Cluster
from vapo_async.simulation.outcome import Outcome
from vapo_async.simulation.run import simulate

LEVELS = (0, 1, 2, 3, 4, 6, 8)
"""Values of S and L that are tried."""
GOOD_ENOUGH = 0.95
"""Share of the best throughput that the recommended pair reaches."""


@dataclass(frozen=True)
class Pair:
    """One point of the plane: medians over the seeds, and all ages together."""

    max_staleness: int
    lead: int
    groups_per_s: float
    least_groups_per_s: float
    most_groups_per_s: float
    tokens_per_s: float
    mean_age: float
    max_age: int
    ages: dict[int, int]
    slots_free: float | None
    workers_empty: float
    learner_idle: float
    tokens_wasted: float
    refunds: dict[str, int]

    @staticmethod
    def of(max_staleness: int, lead: int, outcomes: Sequence[Outcome]) -> "Pair":
        """From one outcome per seed."""
        speeds = [outcome.groups_per_s for outcome in outcomes]
        ages: Counter[int] = sum((Counter(outcome.ages) for outcome in outcomes), Counter())
        free = [outcome.slots_free for outcome in outcomes if outcome.slots_free is not None]
        return Pair(
            max_staleness=max_staleness,
            lead=lead,
            groups_per_s=statistics.median(speeds),
            least_groups_per_s=min(speeds),
            most_groups_per_s=max(speeds),
            tokens_per_s=statistics.median(outcome.tokens_per_s for outcome in outcomes),
            mean_age=statistics.median(outcome.mean_age for outcome in outcomes),
            max_age=max(outcome.max_age for outcome in outcomes),
            ages={age: ages[age] for age in sorted(ages)},
            slots_free=statistics.median(free) if free else None,
            workers_empty=statistics.median(outcome.workers_empty for outcome in outcomes),
            learner_idle=statistics.median(outcome.learner_idle for outcome in outcomes),
            tokens_wasted=statistics.median(outcome.tokens_wasted for outcome in outcomes),
            refunds=dict(sum((Counter(outcome.refunds) for outcome in outcomes), Counter())),
        )


def sweep(
    cluster: Cluster,
    *,
    levels: Sequence[int],
    versions: int,
    warm_up: int,
    seeds: int,
    tell: Callable[[Pair], None] = lambda pair: None,
) -> list[Pair]:
    """Every pair L <= S of ``levels``, the same prompts for all of them.

    S = 0 stands for L = 0 with any S: every ticket belongs to the next batch then, and no bound changes that.
    """
    pairs = []
    for bound in levels:
        for lead in (level for level in levels if level <= bound and (level or not bound)):
            outcomes = [
                simulate(cluster, bound, lead, versions=versions, warm_up=warm_up, seed=seed) for seed in range(seeds)
            ]
            pairs.append(Pair.of(bound, lead, outcomes))
            tell(pairs[-1])
    return pairs


def recommend(pairs: Sequence[Pair]) -> Pair:
    """The smallest mean age (to a tenth), then S, then L, of those that are good enough."""
    best = max(pair.groups_per_s for pair in pairs)
    good = [pair for pair in pairs if pair.groups_per_s >= GOOD_ENOUGH * best]
    return min(good, key=lambda pair: (round(pair.mean_age, 1), pair.max_staleness, pair.lead))


def pareto(pairs: Sequence[Pair]) -> list[Pair]:
    """Those that no other pair beats in throughput without a higher mean age; ascending."""
    line: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: (pair.mean_age, -pair.groups_per_s)):
        if not line or pair.groups_per_s > line[-1].groups_per_s:
            line.append(pair)
    return line


def describe(cluster: Cluster, pairs: Sequence[Pair]) -> str:
    """The table of a plane, the recommended pair and the histogram of its ages."""
    workers, best, taken = cluster.rollout.workers, max(pair.groups_per_s for pair in pairs), recommend(pairs)
    titles = ("groups/s", "of best", "tokens/s", "per worker", "mean age", "max", "slots free", "learner idle", "lost")
    lines = [cluster.name, f"{'':<14}" + "".join(f"{title:>13}" for title in titles)]
    for pair in pairs:
        numbers = (
            f"{pair.groups_per_s:,.3g}",
            f"{pair.groups_per_s / best:.0%}",
            f"{pair.tokens_per_s:,.0f}",
            f"{pair.tokens_per_s / workers:,.0f}",
            f"{pair.mean_age:.2f}",
            f"{pair.max_age}",
            "–" if pair.slots_free is None else f"{pair.slots_free:.0%}",
            f"{pair.learner_idle:.0%}",
            f"{pair.tokens_wasted:.1%}",
        )
        name = f"S {pair.max_staleness}  L {pair.lead}" + (" ←" if pair is taken else "")
        lines.append(f"{name:<14}" + "".join(f"{text:>13}" for text in numbers))
    total = sum(taken.ages.values())
    shares = " · ".join(f"{age}: {count / total:.0%}" for age, count in taken.ages.items())
    lines.append(
        f"take buffer.max_staleness={taken.max_staleness} buffer.lead={taken.lead}: "
        f"{taken.groups_per_s / best:.0%} of the best throughput at a mean age of {taken.mean_age:.2f} (ages {shares})"
    )
    return "\n".join(lines)
