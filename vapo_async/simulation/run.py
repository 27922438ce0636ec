"""The event loop: modelled engines and learner around the real :class:`~vapo_async.buffer.RolloutBuffer`.

Nothing here decides who may start or what is trained on: that is ``admit`` and ``take``. Time is virtual.
"""

import heapq
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from enum import IntEnum
from math import inf
from typing import NamedTuple

from vapo_async.buffer import RolloutBuffer
from vapo_async.buffer.straggler import StragglerWatch
from vapo_async.simulation.cluster import Cluster
from vapo_async.simulation.engines import Group, Worker
from vapo_async.simulation.groups import GroupMaker
from vapo_async.simulation.lengths import sampler
from vapo_async.simulation.outcome import Measures, Outcome

WORKER_LOST, STRAGGLER = "worker lost", "straggler"
MAX_EVENTS_PER_GROUP = 1000
"""More than that and nothing is ever finished."""


class EventKind(IntEnum):
    """What may happen next."""

    RESPONSE = 0  # the next one of a worker ends
    PUBLISHED = 1
    LOST = 2
    BACK = 3
    WAKE = 4  # a straggler may be overdue


class _Learning(NamedTuple):
    """The batch that is being learned."""

    seconds: float
    tokens: int
    ages: list[int]


class Simulation:
    """One run. ``S`` and ``L`` as in ``buffer.max_staleness`` and ``buffer.lead``.

    Prompts come in order, each with lengths of its own from ``seed``: the same ones for every S and L.
    """

    def __init__(self, cluster: Cluster, max_staleness: int, lead: int, seed: int = 0) -> None:
        self.cluster = cluster
        self.buffer = RolloutBuffer(cluster.batch.groups, 1, max_staleness, lead)
        self.now = 0.0
        self.latencies_s: list[float] = []
        """From admission to commit, of every group that was committed."""
        self._workers = [Worker(index, cluster.rollout) for index in range(cluster.rollout.workers)]
        self._asking = deque(self._workers)  # workers with free slots, in the order in which they asked
        self._is_asking = [True] * len(self._workers)
        self._draw: Callable[[], int] = sampler(cluster.lengths, random.Random(f"lengths {seed}"))
        self._chance = random.Random(f"failures {seed}")
        self._returned: deque[tuple[int, tuple[int, ...]]] = deque()
        self._prompts = 0
        self._drops: Counter[int] = Counter()
        self._owners: dict[int, Worker] = {}
        self._tokens: dict[int, int] = {}  # of responses, by committed ticket
        self._events: list[tuple[float, int, EventKind, int, int]] = []
        self._order = 0
        self._learning: _Learning | None = None
        timeout = cluster.stragglers.timeout_s
        self._watch = None if timeout is None else StragglerWatch(timeout)
        self._wake_s = -1.0  # when it is looked at next
        self._changed = True
        self._make_group = GroupMaker()
        self._m = Measures()
        for worker in self._workers:
            self._fail_later(worker)

    def run(self, versions: int, warm_up: int = 0) -> Outcome:
        """Until so many batches are trained on; the first ``warm_up`` ones are not measured."""
        start = self._snapshot()
        most = MAX_EVENTS_PER_GROUP * self.cluster.batch.groups * self.cluster.batch.group_size * versions
        self._settle()
        while self.buffer.published < versions:
            assert self._order < most, f"no end in sight at {self.now:.0f} s: {self.buffer.why_waiting()}"
            self.now, _, kind, index, stamp = heapq.heappop(self._events)
            published = self.buffer.published
            self._handle(kind, index, stamp)
            self._settle()
            if self.buffer.published == warm_up > published:
                start = self._snapshot()
        return Outcome.between(start, self._snapshot(), self.cluster)

    def _settle(self) -> None:
        """What the buffer allows at this moment."""
        while True:
            if self._changed:
                self._take()
            self._feed()
            if not self._drop_overdue():
                return

    def _handle(self, kind: EventKind, index: int, stamp: int) -> None:
        match kind:
            case EventKind.RESPONSE:
                worker = self._workers[index]
                if worker.stamp == stamp:
                    worker.advance(self.now)
                    group = worker.finish_one(self.buffer.published)
                    if group is not None:
                        self._commit(group)
                    self._moved(worker)
            case EventKind.PUBLISHED:
                self._publish()
            case EventKind.LOST:
                self._lose(self._workers[index])
            case EventKind.BACK:
                worker = self._workers[index]
                worker.advance(self.now)
                worker.alive = True
                self._moved(worker)
                self._fail_later(worker)
            case EventKind.WAKE:
                pass

    def _feed(self) -> None:
        """Tickets for the workers that ask, first come first served; a worker takes what its free slots hold."""
        size = self.cluster.batch.group_size
        while self._asking:
            worker = self._asking[0]
            if worker.free <= 0:
                self._is_asking[self._asking.popleft().index] = False
                continue
            clock = time.process_time()
            ticket = self.buffer.admit()
            self._m.buffer_s += time.process_time() - clock
            if ticket is None:
                return
            if self._returned:
                prompt, lengths = self._returned.popleft()
            else:
                prompt, lengths = self._prompts, tuple(self._draw() for _ in range(size))
                self._prompts += 1
            worker.advance(self.now)
            group = Group(ticket.ticket_id, prompt, lengths, worker, self.now, size)
            worker.start(group, self.buffer.published, self.cluster.lengths.prompt_tokens)
            if worker.free == inf:  # nobody takes everything
                self._asking.rotate(-1)
            self._owners[ticket.ticket_id] = worker
            self._expect(worker)

    def _commit(self, group: Group) -> None:
        made = self._make_group(group.ticket_id, group.version)
        clock = time.process_time()
        self.buffer.commit(group.ticket_id, made)
        self._m.buffer_s += time.process_time() - clock
        del self._owners[group.ticket_id]
        self._tokens[group.ticket_id] = sum(group.lengths)
        self.latencies_s.append(self.now - group.admitted_s)
        self._changed = True
        if self._watch is not None:
            self._watch.reset()  # the batch has come a step nearer

    def _take(self) -> None:
        """Has the learner begin with the next batch if it is free and there is one."""
        self._changed = False
        if self._learning is not None:
            return
        clock = time.process_time()
        batch = self.buffer.take()
        self._m.buffer_s += time.process_time() - clock
        if batch is None:
            return
        if self._watch is not None:
            self._watch.reset()
        cluster = self.cluster
        tokens = sum(self._tokens.pop(ticket) for ticket in batch.tickets)
        learner, responses = cluster.learner, cluster.batch.groups * cluster.batch.group_size
        seconds = learner.fixed_s
        if learner.tokens_per_s is not None:
            seconds += (tokens + responses * cluster.lengths.prompt_tokens) / learner.tokens_per_s
        self._learning = _Learning(seconds, tokens, batch.ages)
        self._later(seconds + cluster.transfer_s, EventKind.PUBLISHED)

    def _publish(self) -> None:
        assert self._learning is not None, "a publication without a batch"
        version = self.buffer.publish()
        measures, publication = self._m, self.cluster.publication
        measures.learning_s += self._learning.seconds
        measures.trained_tokens += self._learning.tokens
        measures.ages.update(self._learning.ages)
        measures.published_s.append(self.now)
        assert version == len(measures.published_s), f"version {version}"
        self._learning, self._changed = None, True
        if publication.stall_s or publication.recompute_kv:
            for worker in self._workers:
                worker.advance(self.now)
                if worker.alive:
                    worker.pause(publication.stall_s)
                    if publication.recompute_kv:
                        worker.recompute(self.cluster.lengths.prompt_tokens)
                    self._expect(worker)

    def _lose(self, worker: Worker) -> None:
        worker.advance(self.now)
        worker.stamp += 1
        for group in reversed(worker.lose()):
            self._refund(group, WORKER_LOST)
        self._later(self.cluster.rollout.restart_s, EventKind.BACK, worker.index)

    def _refund(self, group: Group, reason: str) -> None:
        self.buffer.refund(group.ticket_id, reason)
        del self._owners[group.ticket_id]
        self._returned.appendleft((group.prompt, group.lengths))
        self._m.refunds[reason] += 1
        self._changed = True

    def _drop_overdue(self) -> bool:
        """Cancels the group that alone holds the batch up, once it is overdue: the rules of ``Flow``."""
        if self._watch is None or self._learning is not None:
            return False
        ticket = self.buffer.blocker()
        group = None if ticket is None else self._owners[ticket.ticket_id].groups[ticket.ticket_id]
        if group is None or self._drops[group.prompt] >= self.cluster.stragglers.max_drops:
            ticket = None
        if self._watch.overdue(ticket, self.now) and group is not None:
            self._watch.reset()
            self._drops[group.prompt] += 1
            group.worker.advance(self.now)
            group.worker.cancel(group.ticket_id, self.buffer.published)
            self._refund(group, STRAGGLER)
            self._moved(group.worker)
            return True
        seconds = self._watch.remaining(self.now)
        if seconds is not None and self.now + seconds != self._wake_s:
            self._wake_s = self.now + seconds
            self._later(seconds, EventKind.WAKE)
        return False

    def _moved(self, worker: Worker) -> None:
        """After slots of a worker became free."""
        if worker.free > 0 and not self._is_asking[worker.index]:
            self._asking.append(worker)
            self._is_asking[worker.index] = True
        self._expect(worker)

    def _expect(self, worker: Worker) -> None:
        worker.stamp += 1
        end = worker.next_end_s()
        if end is not None:
            self._later(end - self.now, EventKind.RESPONSE, worker.index, worker.stamp)

    def _fail_later(self, worker: Worker) -> None:
        mtbf = self.cluster.rollout.mtbf_s
        if mtbf is not None:
            self._later(self._chance.expovariate(1 / mtbf), EventKind.LOST, worker.index)

    def _later(self, seconds: float, kind: EventKind, index: int = 0, stamp: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._events, (self.now + max(seconds, 0.0), self._order, kind, index, stamp))

    def _snapshot(self) -> Measures:
        for worker in self._workers:
            worker.advance(self.now)
        measures = self._m
        measures.now_s, measures.versions, measures.events = self.now, self.buffer.published, self._order
        measures.slot_s = sum(worker.slot_s for worker in self._workers)
        measures.stalled_s = sum(worker.stalled_s for worker in self._workers)
        measures.empty_s = sum(worker.empty_s for worker in self._workers)
        measures.down_s = sum(worker.down_s for worker in self._workers)
        measures.wasted_tokens = sum(worker.wasted for worker in self._workers)
        measures.decoded_tokens = sum(worker.decoded for worker in self._workers)
        return measures.copy()


def simulate(
    cluster: Cluster, max_staleness: int, lead: int, *, versions: int, warm_up: int = 0, seed: int = 0
) -> Outcome:
    """One run of ``versions`` batches."""
    return Simulation(cluster, max_staleness, lead, seed).run(versions, warm_up)
