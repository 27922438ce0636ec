"""A rollout worker as a queue with a clock of its own.

All responses in the slots of a worker decode at one rate, so its *clock* counts the tokens that each slot has decoded
so far: a response of n tokens that starts at clock c ends at clock c + n, whatever happens to the rate in between.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from math import inf

from vapo_async.simulation.cluster import Rollout


@dataclass
class Group:
    """A ticket with the lengths of its G responses; ``prompt`` survives refunds, and so do the lengths."""

    ticket_id: int
    prompt: int
    lengths: tuple[int, ...]
    worker: "Worker"
    admitted_s: float
    left: int
    """Responses that are not finished."""
    version: int = -1
    """Of its first token; -1 before that."""


class Worker:
    """One engine. Call :meth:`advance` before anything else at a moment."""

    def __init__(self, index: int, rollout: Rollout) -> None:
        self.index, self.alive = index, True
        self.groups: dict[int, Group] = {}
        self.stamp = 0
        """Events that were made under another stamp do not count."""
        self.slot_s = self.stalled_s = self.empty_s = self.down_s = 0.0
        """Seconds: of taken slots, of standing still with work in the slots, with none, and of being lost."""
        self.decoded = 0.0
        """Tokens so far, those of unfinished and lost responses included."""
        self.wasted = 0.0
        """Tokens that were decoded for groups that were lost or cancelled."""
        self._slots = rollout.slots
        self._room = inf if rollout.slots is None else int(rollout.slots * (1 + rollout.ask_ahead))
        self._prefill_s = 0.0 if rollout.prefill_tokens_per_s is None else 1 / rollout.prefill_tokens_per_s
        self._step_s = 1 / rollout.tokens_per_s_alone
        full = rollout.tokens_per_s_full
        slower = 0.0 if full is None or rollout.slots is None else rollout.slots / full - self._step_s
        self._more_s = slower / max((rollout.slots or 2) - 1, 1)
        self._running: list[tuple[float, int, int, Group]] = []  # (clock at its end, order, length, group), a heap
        self._waiting: deque[tuple[int, Group]] = deque()
        self._clock, self._at, self._paused_until = 0.0, 0.0, 0.0
        self._order = 0
        self._starts = 0.0  # sum of the clocks at which the running ones started

    @property
    def free(self) -> float:
        """Responses that may be asked for."""
        return self._room - len(self._running) - len(self._waiting) if self.alive else 0

    @property
    def tokens_in_flight(self) -> float:
        """Decoded by the responses that are running."""
        return len(self._running) * self._clock - self._starts

    def advance(self, now: float) -> None:
        """Brings clock and sums to ``now``."""
        passed, taken = now - self._at, len(self._running)
        if passed <= 0:
            return
        standing = min(max(self._paused_until - self._at, 0.0), passed)
        self._at = now
        if taken:
            ticks = (passed - standing) / self._step(taken)
            self._clock += ticks
            self.decoded += taken * ticks
            self.slot_s += taken * passed
            self.stalled_s += standing
        elif self.alive:
            self.empty_s += passed
        else:
            self.down_s += passed

    def pause(self, seconds: float) -> None:
        """Stands still, after what it stands still for already."""
        self._paused_until = max(self._paused_until, self._at) + seconds

    def start(self, group: Group, version: int, prompt_tokens: int) -> None:
        """Takes a group in; responses without a slot wait."""
        self.groups[group.ticket_id] = group
        self.pause(prompt_tokens * self._prefill_s)
        self._waiting.extend((length, group) for length in group.lengths)
        self._fill(version)

    def recompute(self, prompt_tokens: int) -> None:
        """Prefills what is in flight again."""
        self.pause((self.tokens_in_flight + prompt_tokens * len(self._running)) * self._prefill_s)

    def next_end_s(self) -> float | None:
        """When the next response ends if nothing else happens; None: nothing runs."""
        if not self._running:
            return None
        ticks = max(self._running[0][0] - self._clock, 0.0)
        return max(self._at, self._paused_until) + ticks * self._step(len(self._running))

    def finish_one(self, version: int) -> Group | None:
        """Ends the next response, gives its slot away, returns its group if that one is complete."""
        end, _, length, group = heapq.heappop(self._running)
        self._clock = max(self._clock, end)  # rounding left it a little short
        self._starts -= end - length
        self._fill(version)
        group.left -= 1
        if group.left:
            return None
        del self.groups[group.ticket_id]
        return group

    def cancel(self, ticket_id: int, version: int) -> Group:
        """Takes a group out, whatever has become of it; the slots are given away."""
        group = self.groups.pop(ticket_id)
        self.wasted += self._spent([group])
        self._running = [entry for entry in self._running if entry[3] is not group]
        heapq.heapify(self._running)
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not group)
        self._starts = sum(end - length for end, _, length, _ in self._running)
        self._fill(version)
        return group

    def lose(self) -> list[Group]:
        """Everything that runs is gone; returns the groups, oldest first."""
        lost = list(self.groups.values())
        self.wasted += self._spent(lost)
        self.alive = False
        self.groups.clear()
        self._running.clear()
        self._waiting.clear()
        self._paused_until, self._starts = self._at, 0.0
        return lost

    def _spent(self, groups: list[Group]) -> float:
        """Tokens decoded for them so far."""
        theirs = {group.ticket_id for group in groups}
        waiting = sum(length for length, group in self._waiting if group.ticket_id in theirs)
        to_come = sum(end - self._clock for end, _, _, group in self._running if group.ticket_id in theirs)
        return sum(sum(group.lengths) for group in groups) - waiting - to_come

    def _fill(self, version: int) -> None:
        while self._waiting and (self._slots is None or len(self._running) < self._slots):
            length, group = self._waiting.popleft()
            if group.version < 0:
                group.version = version
            self._order += 1
            self._starts += self._clock
            heapq.heappush(self._running, (self._clock + length, self._order, length, group))

    def _step(self, taken: int) -> float:
        """Seconds of a decode step with so many slots taken."""
        return self._step_s + self._more_s * (taken - 1)
