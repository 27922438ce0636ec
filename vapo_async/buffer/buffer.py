"""Tickets, ages and bounded storage: a state machine that never waits (docs/staleness.md).

    admit ──ticket──▶ (collector, verifier) ──▶ commit ──▶ take ──batch──▶ (learner) ──▶ publish
                               └──────────────▶ refund, reject

Every method returns at once; the launcher does the waiting. One thread at a time: the class holds no lock.
Learner's turn: ``take`` until it gives a batch, train, ``publish``, and again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from torchrl.data import LazyStackStorage, ReplayBuffer, RoundRobinWriter
from torchrl.envs.transforms import PolicyAgeFilter

from vapo_async.buffer.batch import Batch, PublicationError, StalenessViolation, TicketError, check_group
from vapo_async.buffer.budget import Choice, StalenessBudget, choose_batch
from vapo_async.buffer.sampler import ChosenSampler
from vapo_async.schema import GROUP_ID, POLICY_VERSION, Ticket

UNSERVED = "not in the checkpoint"
"""The reason under which a checkpoint counts the tickets that it does not hold."""


@dataclass
class _Entry:
    """A ticket in the queue. ``slot`` and ``oldest`` are set by ``commit``."""

    ticket: Ticket
    slot: int | None = None  # where the group lies in the storage; None while it is being generated
    oldest: int = -1  # smallest policy_version among the generated tokens


class RolloutBuffer:
    """Admission control and deadlines over a TorchRL ``ReplayBuffer`` of ragged groups.

    Groups belong to the buffer from ``commit`` on: nothing is copied. At most (L + 1) * B groups are ever held.

    Args:
        groups_per_batch: B, groups of one batch.
        group_size: G, responses of one group.
        max_staleness: S, the largest age at take, in versions.
        lead: L <= S, batches that generation may run ahead.

    Raises:
        ValueError: unless B >= 1, G >= 1 and 0 <= L <= S.
    """

    def __init__(self, groups_per_batch: int, group_size: int, max_staleness: int, lead: int) -> None:
        self._budget = StalenessBudget(groups_per_batch, max_staleness, lead)
        if group_size < 1:
            raise ValueError(f"group_size >= 1 does not hold: group_size={group_size}")
        self._group_size = group_size
        self._queue: dict[int, _Entry] = {}  # by ticket id = in order of admission: running and ready
        self._ready = 0
        self._committed = 0
        self._refund_reasons: dict[str, int] = {}
        self._batch_out = False
        self._closed = False
        self._sampler = ChosenSampler()
        # compilable=True: plain integers for the cursors instead of semaphores shared between processes.
        self._storage = ReplayBuffer(
            storage=LazyStackStorage((lead + 1) * groups_per_batch, compilable=True),
            sampler=self._sampler,
            writer=RoundRobinWriter(compilable=True),
            consume_after_n_samples=1,
            batch_size=groups_per_batch,
        )
        self._age_filter = PolicyAgeFilter(lambda: self._budget.published, max_staleness, strict=True)

    def admit(self) -> Ticket | None:
        """A ticket at the published version, or None while the lead is spent or the buffer is closed."""
        if self._closed:
            return None
        ticket_id = self._budget.charge()
        if ticket_id is None:
            return None
        ticket = Ticket(ticket_id, self._budget.published)
        self._queue[ticket_id] = _Entry(ticket)
        return ticket

    def commit(self, ticket_id: int, group: TensorDictBase) -> None:
        """Ends a ticket with its group (G trajectories, as ``schema.stack_group`` makes them).

        Raises ``TicketError`` if the ticket is not running, ``ValueError`` if the group breaks the schema or is not the
        ticket's; the ticket then stays outstanding, to be committed again or refunded.
        """
        entry = self._running(ticket_id)
        oldest = check_group(entry.ticket, group, self._group_size)
        slot = int(self._storage.extend([group]))
        assert len(self._storage) == self._ready + 1, f"slot {slot} held an unread group"
        entry.slot, entry.oldest = slot, oldest
        self._ready += 1
        self._committed += 1

    def refund(self, ticket_id: int, reason: str) -> None:
        """Ends a ticket without a group and gives its place to a new one; ``reason`` is counted.

        Raises ``TicketError`` if the ticket is not running.
        """
        self._running(ticket_id)
        del self._queue[ticket_id]
        self._budget.refund()
        self._refund_reasons[reason] = self._refund_reasons.get(reason, 0) + 1

    def reject(self, ticket_id: int, group: TensorDictBase, reason: str) -> None:
        """Ends a ticket with a refund though it has its group, which nobody is to train on. Raises as ``commit``."""
        check_group(self._running(ticket_id).ticket, group, self._group_size)
        self.refund(ticket_id, reason)

    def take(self) -> Batch | None:
        """The B oldest finished groups, or None while :meth:`why_waiting` has a reason.

        Raises ``PublicationError`` if the batch before was not published, ``StalenessViolation`` if a group is too old.
        """
        if self._batch_out:
            raise PublicationError("take() before publish(): the batch taken before has to be published first")
        budget = self._budget
        choice = self._choose()
        if choice.positions is None:
            return None
        queue = list(self._queue.values())
        entries = [queue[position] for position in choice.positions]
        self._check_ages(entries)
        self._sampler.choose([entry.slot for entry in entries if entry.slot is not None])
        groups = self._storage.sample().unbind(0)
        for entry in entries:
            del self._queue[entry.ticket.ticket_id]
        self._ready -= len(entries)
        self._batch_out = True
        return Batch(
            groups=LazyStackedTensorDict(*(t for group in groups for t in group.unbind(0)), stack_dim=0),
            ages=[budget.published - entry.oldest for entry in entries],
            version=budget.published,
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
    def published(self) -> int:
        """Versions published so far."""
        return self._budget.published

    @property
    def outstanding(self) -> int:
        """Tickets that are running: admitted, neither committed nor refunded."""
        return len(self._queue) - self._ready

    @property
    def ready(self) -> int:
        """Groups that are committed and not taken."""
        return self._ready

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
        """Running and ready tickets in order of admission: a checkpoint has to put their prompts back in front."""
        return [entry.ticket for entry in self._queue.values()]

    def straggler(self) -> Ticket | None:
        """The running ticket that the learner waits for, or None.

        It is the one whose deadline forbids the batch; while fewer than B groups are finished, the oldest running one.
        """
        if self._batch_out:
            return None
        choice = self._choose()
        if choice.late is not None:
            return self._at(choice.late).ticket
        if choice.positions is not None:
            return None
        return next((entry.ticket for entry in self._queue.values() if entry.slot is None), None)

    def why_waiting(self) -> str:
        """One line: what the learner's next batch waits for."""
        budget, late = self._budget, self.straggler()
        if self._batch_out:
            return f"the batch taken at version {budget.published} has not been published"
        finished = f"{self._ready} of {budget.groups_per_batch} groups are finished"
        if late is None:
            if self._ready >= budget.groups_per_batch:
                return "nothing: a batch is ready"
            hint = "the buffer is closed" if self._closed else f"admission is open: {budget.can_admit()}"
            return f"{finished} and no ticket is running ({hint})"
        who = f"ticket {late.ticket_id} (admitted at version {late.version}, now {budget.published})"
        if self._ready >= budget.groups_per_batch:
            return f"{finished}, but {who} would become older than max_staleness={budget.max_staleness} if overtaken"
        return f"{finished}, {self.outstanding} tickets are running, the oldest is {who}"

    def state_dict(self) -> dict[str, Any]:
        """Counters as plain JSON, without changing the buffer: no group and no running ticket is saved.

        Both are counted as refunded in the state, so that ``charged − refunded = published * B`` on resume and neither
        a burst nor a gap follows; save the prompts of :meth:`unserved` beside it, to go back in front.
        Raises ``PublicationError`` between take and publish, when the batch belongs to neither side.
        """
        if self._batch_out:
            raise PublicationError("state_dict() between take() and publish(): save after the publication")
        dropped, reasons = len(self._queue), self.refund_reasons
        if dropped:
            reasons[UNSERVED] = reasons.get(UNSERVED, 0) + dropped
        budget = self._budget.state_dict()
        budget["refunded"] += dropped
        return {"budget": budget, "committed": self._committed - self._ready, "refund_reasons": reasons}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counters; the next ticket id follows the last one. For a buffer that has given no ticket.

        Raises ``ConfigError`` if B differs, ``ValueError`` if the counters do not balance, ``TicketError`` if tickets
        were given.
        """
        if self._budget.charged:
            raise TicketError(f"load_state_dict() after {self._budget.charged} tickets were given: load first")
        self._budget.load_state_dict(state["budget"])
        self._committed = state["committed"]
        self._refund_reasons = dict(state["refund_reasons"])

    def _choose(self) -> Choice:
        """The batch as it stands; deadlines speak only once B groups are finished."""
        budget = self._budget
        if self._ready < budget.groups_per_batch:
            return Choice(None, None)
        states = ((entry.ticket.version, entry.slot is not None) for entry in self._queue.values())
        choice = choose_batch(states, budget.groups_per_batch, budget.max_staleness, budget.published)
        if choice.late is not None and self._at(choice.late).slot is not None:
            late = self._at(choice.late).ticket
            raise StalenessViolation(
                f"ticket {late.ticket_id} (admitted at version {late.version}, now {budget.published}) is finished but "
                f"cannot be served within max_staleness={budget.max_staleness}"
            )
        return choice

    def _at(self, position: int) -> _Entry:
        return next(islice(self._queue.values(), position, None))

    def _running(self, ticket_id: int) -> _Entry:
        entry = self._queue.get(ticket_id)
        if entry is None or entry.slot is not None:
            known = 0 <= ticket_id < self._budget.charged
            raise TicketError(
                f"ticket {ticket_id} has already ended: a ticket is committed or refunded exactly once"
                if known
                else f"ticket {ticket_id} was never given"
            )
        return entry

    def _check_ages(self, entries: Sequence[_Entry]) -> None:
        """The second gate: TorchRL's filter over the oldest token of every group, against the live version."""
        rows = TensorDict(
            {POLICY_VERSION: torch.tensor([entry.oldest for entry in entries])}, batch_size=[len(entries)]
        )
        if len(self._age_filter(rows)) < len(entries):
            now, bound = self._budget.published, self._budget.max_staleness
            late = {e.ticket.ticket_id: now - e.oldest for e in entries if now - e.oldest > bound}
            raise StalenessViolation(f"older than max_staleness={bound} at version {now}: ages by ticket {late}")
