"""Tickets, ages and bounded storage: a state machine that never waits (docs/staleness.md).

    admit ──ticket──▶ (collector, verifier) ──▶ commit ──▶ take ──batch──▶ (learner) ──▶ publish
                               └──────────────▶ refund, reject

Every method returns at once; the launcher does the waiting. One thread at a time: the class holds no lock.
Learner's turn: ``take`` until it gives a batch, train, ``publish``, and again.

What a group costs does not depend on how many are held or have passed through; ``state_dict``, ``load_state_dict`` and
``unserved`` go over the whole queue.
"""

from tensordict import LazyStackedTensorDict, TensorDictBase

from vapo_async.buffer.batch import Batch, PublicationError, TicketError, check_group
from vapo_async.buffer.budget import StalenessBudget, late
from vapo_async.buffer.gate import AgeGate
from vapo_async.buffer.packing import pack_groups, unpack_groups
from vapo_async.buffer.queue import Entry, TicketQueue
from vapo_async.buffer.storage import GroupStorage
from vapo_async.config import ConfigError
from vapo_async.schema import GROUP_ID, Ticket
from vapo_async.state import State

BOUND_LOWERED = "max_staleness was lowered"
"""The reason of a refund on resume: the ticket could not be served within the new bound."""
SCHEMA_CHANGED = "saved group breaks the schema"
"""The reason of a refund on resume: another version of this software wrote the group."""


class RolloutBuffer:
    """Admission control and deadlines over a TorchRL ``ReplayBuffer`` of ragged groups.

    Groups belong to the buffer from ``commit`` on: nothing is copied. At most min((L + 1) * B, C) groups are ever held,
    or as many as a resume restored.

    Args:
        groups_per_batch: B, groups of one batch.
        group_size: G, responses of one group.
        max_staleness: S, the largest age at take, in versions.
        lead: L <= S, batches that generation may run ahead.
        capacity: C >= B, tickets that are given and whose batch is not published; None sets no limit beyond the lead's.
        max_running: tickets that run at one time; None sets no limit.

    Raises:
        ValueError: unless B >= 1, G >= 1, 0 <= L <= S, C >= B and max_running >= 1.
    """

    def __init__(
        self,
        groups_per_batch: int,
        group_size: int,
        max_staleness: int,
        lead: int,
        *,
        capacity: int | None = None,
        max_running: int | None = None,
    ) -> None:
        self._budget = StalenessBudget(groups_per_batch, max_staleness, lead, capacity)
        if group_size < 1:
            raise ValueError(f"group_size >= 1 does not hold: group_size={group_size}")
        if max_running is not None and max_running < 1:
            raise ValueError(f"max_running >= 1 does not hold: max_running={max_running}")
        self._group_size, self.max_running = group_size, max_running
        self._queue = TicketQueue(self._budget)
        self._committed = 0
        self._refund_reasons: dict[str, int] = {}
        self._batch_out = False
        self._closed = False
        self._storage = GroupStorage(self._budget.places, groups_per_batch)
        self._gate = AgeGate(self._budget)

    def admit(self) -> Ticket | None:
        """A ticket at the published version, or None while :attr:`can_admit` is False."""
        if not self.can_admit:
            return None
        ticket_id = self._budget.charge()
        assert ticket_id is not None
        ticket = Ticket(ticket_id, self._budget.published)
        self._queue.append(Entry(ticket))
        return ticket

    def commit(self, ticket_id: int, group: TensorDictBase) -> None:
        """Ends a ticket with its group (G trajectories, as ``schema.stack_group`` makes them).

        Raises ``TicketError`` if the ticket is not running, ``ValueError`` if the group breaks the schema or is not the
        ticket's; the ticket then stays outstanding, to be committed again or refunded.
        """
        entry = self._queue.running(ticket_id)
        oldest = check_group(entry.ticket, group, self._group_size)
        self._queue.finish(entry, self._storage.put(group), oldest)
        self._committed += 1

    def refund(self, ticket_id: int, reason: str) -> None:
        """Ends a ticket without a group and gives its place to a new one; ``reason`` is counted.

        Raises ``TicketError`` if the ticket is not running.
        """
        self._queue.remove(self._queue.running(ticket_id))
        self._count_refund(reason)

    def reject(self, ticket_id: int, group: TensorDictBase, reason: str) -> None:
        """Ends a ticket with a refund though it has its group, which nobody is to train on. Raises as ``commit``."""
        check_group(self._queue.running(ticket_id).ticket, group, self._group_size)
        self.refund(ticket_id, reason)

    def take(self) -> Batch | None:
        """The B oldest finished groups, or None while :meth:`why_waiting` has a reason.

        Raises ``PublicationError`` if the batch before was not published, ``StalenessViolation`` if a group is too old.
        """
        if self._batch_out:
            raise PublicationError("take() before publish(): the batch taken before has to be published first")
        entries = self._queue.next_batch()
        if entries is None:
            return None
        self._gate.check(entries)
        groups = self._storage.draw([entry.slot for entry in entries if entry.slot is not None])
        for entry in entries:
            self._queue.remove(entry)
        self._batch_out = True
        now = self._budget.published
        return Batch(
            groups=LazyStackedTensorDict(*(t for group in groups for t in group.unbind(0)), stack_dim=0),
            ages=[now - entry.oldest for entry in entries],
            version=now,
            tickets=[entry.ticket.ticket_id for entry in entries],
            group_ids=[int(group[0][GROUP_ID]) for group in groups],
        )

    def publish(self) -> int:
        """Counts the version that the batch taken last led to, and returns it.

        Raises ``PublicationError`` if no batch was taken since the last publication: versions = trained batches.
        """
        if not self._batch_out:
            raise PublicationError("publish() without a batch: every publication follows one take()")
        self._batch_out = False
        return self._budget.publish()

    def close(self) -> None:
        """Ends admission for good. Running tickets still end by commit or refund, and full batches can be taken."""
        self._closed = True

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    @property
    def can_admit(self) -> bool:
        """False while lead, capacity or ``max_running`` is spent, and once the buffer is closed."""
        free = self.max_running is None or self.outstanding < self.max_running
        return not self._closed and free and self._budget.can_admit()

    @property
    def groups_per_batch(self) -> int:
        """B."""
        return self._budget.groups_per_batch

    @property
    def published(self) -> int:
        """Versions published so far."""
        return self._budget.published

    @property
    def outstanding(self) -> int:
        """Tickets that are running: admitted, neither committed nor refunded."""
        return len(self._queue) - self._queue.ready

    @property
    def ready(self) -> int:
        """Groups that are committed and not taken."""
        return self._queue.ready

    @property
    def committed(self) -> int:
        """Groups committed over the whole run, resumes included."""
        return self._committed

    @property
    def refund_reasons(self) -> dict[str, int]:
        """Refunds by reason, over the whole run."""
        return dict(self._refund_reasons)

    def ticket_counts(self) -> dict[str, int]:
        """Cumulative, over resumes too; charged = committed + refunded + outstanding, always."""
        return {
            "charged": self._budget.charged,
            "committed": self._committed,
            "refunded": self._budget.refunded,
            "outstanding": self.outstanding,
        }

    def unserved(self) -> list[Ticket]:
        """Running and ready tickets in order of admission."""
        return [entry.ticket for entry in self._queue]

    def running(self) -> list[Ticket]:
        """Running tickets in order of admission."""
        return [entry.ticket for entry in self._queue if entry.slot is None]

    def straggler(self) -> Ticket | None:
        """The running ticket that the learner waits for, or None.

        It is the one whose deadline forbids the batch; while fewer than B groups are finished, the oldest running one.
        """
        return None if self._batch_out else self._queue.straggler()

    def blocker(self) -> Ticket | None:
        """The straggler, if no other ticket can take its place in the batch.

        Either its deadline forbids the batch, or all that is finished and running is not one group more than the batch
        needs and nothing can be admitted. While others may still fill the batch, it is merely slow.
        """
        batch = self.groups_per_batch
        replaceable = self.ready < batch and (len(self._queue) > batch or self.can_admit)
        return None if replaceable else self.straggler()

    def why_waiting(self) -> str:
        """One line: what the learner's next batch waits for."""
        budget, slow = self._budget, self.straggler()
        if self._batch_out:
            return f"the batch taken at version {budget.published} has not been published"
        finished = f"{self.ready} of {budget.groups_per_batch} groups are finished"
        if slow is None:
            if self.ready >= budget.groups_per_batch:
                return "nothing: a batch is ready"
            hint = "the buffer is closed" if self._closed else f"admission is open: {self.can_admit}"
            return f"{finished} and no ticket is running ({hint})"
        who = f"ticket {slow.ticket_id} (admitted at version {slow.version}, now {budget.published})"
        if self.ready >= budget.groups_per_batch:
            return f"{finished}, but {who} would become older than max_staleness={budget.max_staleness} if overtaken"
        return f"{finished}, {self.outstanding} tickets are running, the oldest is {who}"

    def state_dict(self) -> State:
        """Counters, the queue and the groups that are ready; nothing of it is changed.

        Raises ``PublicationError`` between take and publish, when the batch belongs to neither side.
        """
        if self._batch_out:
            raise PublicationError("state_dict() between take() and publish(): save after the publication")
        data = {
            "budget": self._budget.state_dict(),
            "group_size": self._group_size,
            "committed": self._committed,
            "refund_reasons": self.refund_reasons,
            "queue": [[e.ticket.ticket_id, e.ticket.version, e.slot is not None] for e in self._queue],
        }
        return State(data, pack_groups([self._storage.get(e.slot) for e in self._queue if e.slot is not None]))

    def load_state_dict(self, state: State) -> list[Ticket]:
        """Restores all of it, for a buffer that has given no ticket. S, L, C and ``max_running`` may be others now.

        Returns the tickets, in order, that had to be refunded: those that would break a lower S, and those whose group
        is not what the schema asks for.

        Raises ``ConfigError`` if B or G differs, ``ValueError`` if the counters do not balance, ``TicketError`` if
        tickets were given.
        """
        if self._budget.charged:
            raise TicketError(f"load_state_dict() after {self._budget.charged} tickets were given: load first")
        data, size = state.data, self._group_size
        self._budget.load_state_dict(data["budget"], len(data["queue"]))
        if data["group_size"] != size:
            raise ConfigError(
                f"the checkpoint was written with algorithm.group_size={data['group_size']}, this run has {size}: "
                f"resume with algorithm.group_size={data['group_size']}"
            )
        self._committed, self._refund_reasons = data["committed"], dict(data["refund_reasons"])
        budget, versions = self._budget, [version for _, version, _ in data["queue"]]
        self._storage = GroupStorage(max(budget.places, len(versions)), budget.groups_per_batch)
        overdue = {*late(versions, budget.groups_per_batch, budget.max_staleness, budget.published)}
        groups = iter(unpack_groups(state.tensors, size))
        refunded: list[Ticket] = []
        for index, (ticket_id, version, ready) in enumerate(data["queue"]):
            ticket, group = Ticket(ticket_id, version), next(groups) if ready else None
            reason = BOUND_LOWERED if index in overdue else self._restore(ticket, group)
            if reason is not None:
                self._committed -= ready
                self._count_refund(reason)
                refunded.append(ticket)
        return refunded

    def _restore(self, ticket: Ticket, group: TensorDictBase | None) -> str | None:
        """Back into the queue; why it cannot be, or None."""
        entry = Entry(ticket)
        if group is not None:
            try:
                oldest = check_group(ticket, group, self._group_size)
            except ValueError:
                return SCHEMA_CHANGED
            entry = Entry(ticket, self._storage.put(group), oldest)
        self._queue.append(entry)
        return None

    def _count_refund(self, reason: str) -> None:
        self._budget.refund()
        self._refund_reasons[reason] = self._refund_reasons.get(reason, 0) + 1
