"""The staleness arithmetic: integers and inequalities, no lock, no waiting, no tensors (docs/staleness.md).

Units: ``charged`` and ``refunded`` count tickets (one ticket = one prompt group), ``published`` counts versions.

- **Admission** spends the lead L, or the capacity C where that is less: a ticket is given while
  ``charged - refunded < published * B + min((L + 1) * B, C)``.
- **Take** keeps the deadlines: after it, the ticket at position i of the queue with admission version m satisfies
  ``published + 1 + i // B - m <= S``: served in order, B at a time, nobody becomes older than S.

Why no group is ever older than S, and nothing deadlocks. Call a queue *in time* if every ticket satisfies
``published + i // B - m <= S``.
1. A new ticket stands at i < min((L + 1) * B, C) with m = published, so its left side is at most L <= S.
2. A take is made only when the rest is in time at ``published + 1``; a refund, of a straggler too, only lowers
   positions.
3. So every queue is in time, and taking its first B leaves every position i as i - B: ``published + 1 + (i - B) // B``
   is ``published + i // B``. Serving in order is always feasible; when all have finished, it is what a take does.
4. The B oldest finished tickets are the best choice there is. Those behind the last one taken move from i to i - B and
   keep the schedule of (3), so nobody has to look at them; only the unfinished ones that are overtaken can miss a
   deadline, and each has then just the unfinished ones before it, which no other choice can lower. So the learner waits
   only for a ticket that must be waited for.
5. C >= B leaves a place for every ticket of the next batch: with nothing running there is a batch to take or a ticket
   to give.
6. A queue that a resume restores is in time under the S that it was saved with, whatever L and C are now: where they
   are less, nobody is admitted until (1) holds again. Under a lower S those who are late are refunded (:func:`late`).
Slack is S minus the left side above. With L = S there is none for a ticket that was given as soon as it could be: after
version S, and until a refund moves somebody forward, that is strict first-in-first-out. S = 0 always is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vapo_async.config import ConfigError


def in_time(position: int, version: int, groups_per_batch: int, max_staleness: int, published: int) -> bool:
    """After the next take: is a ticket admitted at ``version`` young enough when served in order from ``position``?"""
    return published + 1 + position // groups_per_batch - version <= max_staleness


def late(versions: Iterable[int], groups_per_batch: int, max_staleness: int, published: int) -> list[int]:
    """Indices of the tickets without which a queue is in time: each one that is late behind those that stay.

    Args:
        versions: admission versions in order of admission, the oldest first.
        groups_per_batch: B.
        max_staleness: S, in versions.
        published: versions published so far.
    """
    found: list[int] = []
    for index, version in enumerate(versions):
        if not in_time(index - len(found), version, groups_per_batch, max_staleness, published - 1):
            found.append(index)
    return found


class Choice(NamedTuple):
    """What a take may do now."""

    positions: list[int] | None
    """Of the B oldest finished tickets; None while there are fewer or a deadline forbids them."""
    late: int | None
    """Position of the first ticket that would miss its deadline; never a finished one (4. above)."""


def choose_batch(
    tickets: Iterable[tuple[int, bool]], groups_per_batch: int, max_staleness: int, published: int
) -> Choice:
    """The take by the deadlines: one walk, which ends at the B-th finished ticket or at one whose deadline forbids it.

    It reads B tickets and those that they overtake, however long the queue is: the ones behind need no look (4. above).

    Args:
        tickets: (admission version, finished) in order of admission, the oldest first; a queue that is in time.
        groups_per_batch: B.
        max_staleness: S, in versions.
        published: versions published so far.
    """
    chosen: list[int] = []
    for position, (version, finished) in enumerate(tickets):
        if finished:
            chosen.append(position)
            if len(chosen) == groups_per_batch:
                return Choice(chosen, None)
        elif not in_time(position - len(chosen), version, groups_per_batch, max_staleness, published):
            return Choice(None, position)
    return Choice(None, None)


@dataclass
class StalenessBudget:
    """Three counters and two inequalities.

    Raises ``ValueError`` naming the inequality unless B >= 1, 0 <= L <= S and C >= B.
    """

    groups_per_batch: int
    """B: groups of one batch."""
    max_staleness: int
    """S: the largest age of a group at take, in versions."""
    lead: int
    """L: batches that generation may run ahead."""
    capacity: int | None = None
    """C: tickets that are given and whose batch is not published, at most; None is (L + 1) * B."""
    charged: int = 0
    """Tickets given, ever."""
    refunded: int = 0
    """Tickets given back, ever."""
    published: int = 0
    """Versions published = batches trained."""

    def __post_init__(self) -> None:
        if self.groups_per_batch < 1:
            raise ValueError(f"groups_per_batch >= 1 does not hold: groups_per_batch={self.groups_per_batch}")
        if not 0 <= self.lead <= self.max_staleness:
            raise ValueError(
                "0 <= lead <= max_staleness does not hold: "
                f"lead={self.lead}, max_staleness={self.max_staleness}; lower the lead or raise the bound"
            )
        if self.capacity is not None and self.capacity < self.groups_per_batch:
            raise ValueError(
                "capacity >= groups_per_batch does not hold: "
                f"capacity={self.capacity}, groups_per_batch={self.groups_per_batch}; with less no batch is ever full"
            )

    @property
    def places(self) -> int:
        """min((L + 1) * B, C): tickets that admission lets be unpublished at one time."""
        lead = (self.lead + 1) * self.groups_per_batch
        return lead if self.capacity is None else min(lead, self.capacity)

    def can_admit(self) -> bool:
        """True while a ticket may be given."""
        return self.charged - self.refunded < self.published * self.groups_per_batch + self.places

    def charge(self) -> int | None:
        """Checks and charges in one step: the new ticket's id (0, 1, 2, … never reused), or None when not admitted."""
        if not self.can_admit():
            return None
        self.charged += 1
        return self.charged - 1

    def refund(self) -> None:
        """Gives one ticket back."""
        assert self.refunded < self.charged, "more refunds than tickets"
        self.refunded += 1

    def publish(self) -> int:
        """Counts one more version and returns it."""
        self.published += 1
        return self.published

    def state_dict(self) -> dict[str, int]:
        """The counters and B; S, L and C may change on resume."""
        return {
            "groups_per_batch": self.groups_per_batch,
            "charged": self.charged,
            "refunded": self.refunded,
            "published": self.published,
        }

    def load_state_dict(self, state: dict[str, int], queued: int = 0) -> None:
        """Raises ``ConfigError`` if B differs, ``ValueError`` unless charged - refunded == published * B + ``queued``.

        With more charged than the queue holds, tickets would be missing that nobody ends; with less, a burst follows.
        """
        found, expected = state["groups_per_batch"], self.groups_per_batch
        if found != expected:
            raise ConfigError(
                f"the checkpoint was written with algorithm.groups_per_batch={found}, this run has {expected}: "
                f"resume with algorithm.groups_per_batch={found}"
            )
        held, expected = state["charged"] - state["refunded"], state["published"] * self.groups_per_batch + queued
        if held != expected:
            raise ValueError(
                "charged - refunded == published * groups_per_batch + queued does not hold in the checkpoint: "
                f"{held} != {expected}"
            )
        self.charged, self.refunded, self.published = state["charged"], state["refunded"], state["published"]
