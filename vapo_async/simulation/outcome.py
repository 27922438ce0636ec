"""What a run is measured by."""

import math
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field

from vapo_async.simulation.cluster import Cluster


@dataclass
class Measures:
    """Sums since the start of a run."""

    now_s: float = 0.0
    versions: int = 0
    events: int = 0
    learning_s: float = 0.0
    slot_s: float = 0.0
    stalled_s: float = 0.0
    empty_s: float = 0.0
    down_s: float = 0.0
    decoded_tokens: float = 0.0
    wasted_tokens: float = 0.0
    trained_tokens: int = 0
    buffer_s: float = 0.0
    """CPU-seconds inside ``admit``, ``commit`` and ``take``."""
    ages: Counter[int] = field(default_factory=Counter)
    refunds: Counter[str] = field(default_factory=Counter)
    published_s: list[float] = field(default_factory=list)

    def copy(self) -> "Measures":
        return deepcopy(self)


@dataclass(frozen=True)
class Outcome:
    """Between two moments of a run. Shares are of 1; ages in versions, of the groups that were trained on."""

    versions: int
    wall_s: float
    groups_per_s: float
    tokens_per_s: float
    """Response tokens trained on."""
    slots_free: float | None
    """Share of slot-seconds without a response; None where slots are unlimited."""
    workers_empty: float
    """Share of worker-seconds without any response, lost workers included."""
    workers_stalled: float
    """Share of worker-seconds in prefill and publications with responses in the slots."""
    learner_idle: float
    learning_s: float
    tokens_wasted: float
    """Share of the decoded tokens that failures and dropped stragglers cost."""
    mean_age: float
    max_age: int
    ages: dict[int, int]
    refunds: dict[str, int]
    events: int
    buffer_us: float
    """CPU-microseconds inside the buffer for each group."""

    @staticmethod
    def between(start: Measures, end: Measures, cluster: Cluster) -> "Outcome":
        """Rates between two snapshots of one run."""
        wall, versions = end.now_s - start.now_s, end.versions - start.versions
        groups, workers = versions * cluster.batch.groups, cluster.rollout.workers
        slots, worker_s = cluster.rollout.slots, workers * wall
        ages = end.ages - start.ages
        trained = end.trained_tokens - start.trained_tokens
        down = end.down_s - start.down_s
        return Outcome(
            versions=versions,
            wall_s=wall,
            groups_per_s=_share(groups, wall),
            tokens_per_s=_share(trained, wall),
            slots_free=None if slots is None else 1 - _share(end.slot_s - start.slot_s, slots * worker_s),
            workers_empty=_share(end.empty_s - start.empty_s + down, worker_s),
            workers_stalled=_share(end.stalled_s - start.stalled_s, worker_s),
            learner_idle=1 - _share(end.learning_s - start.learning_s, wall),
            learning_s=end.learning_s - start.learning_s,
            tokens_wasted=_share(end.wasted_tokens - start.wasted_tokens, end.decoded_tokens - start.decoded_tokens),
            mean_age=_share(sum(age * n for age, n in ages.items()), ages.total()),
            max_age=max(ages, default=0),
            ages={age: ages[age] for age in sorted(ages)},
            refunds=dict(end.refunds - start.refunds),
            events=end.events - start.events,
            buffer_us=1e6 * _share(end.buffer_s - start.buffer_s, groups),
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
