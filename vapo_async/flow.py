"""Tickets and their prompts together: what admission hands out, and what a refund, a drop or a checkpoint gives back.

A state machine like the parts that it holds: it never waits, one thread at a time, the time is an argument.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tensordict import TensorDictBase

from vapo_async.buffer import (
    ALL_RIGHT,
    ALL_WRONG,
    DROPPED,
    GENERATED,
    REFUSED,
    TRAINED,
    Batch,
    DynamicSampling,
    FlowCounters,
    LengthAudit,
    RolloutBuffer,
    StragglerWatch,
)
from vapo_async.prompts.stream import PromptStream
from vapo_async.responses import pack_by_ticket, unpack_by_ticket
from vapo_async.schema import Prompt, Response, Ticket, prompt_from_json, prompt_to_json, response_lengths
from vapo_async.state import State, under

WORKER_LOST, STRAGGLER = "worker lost", "straggler"
"""Reasons of refunds."""


@dataclass(frozen=True)
class Assignment:
    """The right and the order to generate one group."""

    ticket: Ticket
    prompt: Prompt
    carried: tuple[Response, ...] = ()
    """What a run that is resumed had of it already; ``ABORTED`` ones are gone on with."""


class Flow:
    """Prompts → tickets → buffer. Every ticket has a prompt until its group is trained on or refunded.

    Args:
        stream: gives prompts, returned ones first.
        buffer: admission, deadlines, storage.
        sampling: refuses groups that are all right or all wrong; None takes every group.
        straggler: times what the learner waits for; None waits for every ticket.
        max_drops: times that one prompt may be dropped; from then on it is waited for, so that no prompt starves.
    """

    def __init__(
        self,
        stream: PromptStream,
        buffer: RolloutBuffer,
        sampling: DynamicSampling | None = None,
        straggler: StragglerWatch | None = None,
        max_drops: int = 0,
    ) -> None:
        self._stream, self._buffer, self._sampling = stream, buffer, sampling
        self._watch, self._max_drops = straggler, max_drops
        self._prompts: dict[int, Prompt] = {}  # by ticket, running and ready
        self._owners: dict[int, str] = {}  # by ticket, running and not an orphan
        self._orphans: dict[int, Assignment] = {}  # by ticket, running and nobody goes on with it
        self._cancelled: dict[int, str] = {}  # tickets refunded behind their owner's back, until it is heard of them
        self._lost: set[str] = set()
        self._drops: dict[int, int] = {}  # by group id, until it is committed or refused
        self._drop_count = 0
        self._lengths = LengthAudit()

    def admit(self, most: int, owner: str = "") -> list[Assignment]:
        """Up to ``most`` assignments for ``owner``; fewer, or none, while the lead is spent or the flow is closed.

        Running tickets of a loaded state that nobody goes on with come first, the oldest first. An owner that was lost
        gets none.
        """
        assignments: list[Assignment] = []
        if self.closed or owner in self._lost:
            return assignments
        room = most if self._buffer.max_running is None else self._buffer.max_running - len(self._owners)
        for ticket_id in [*islice(self._orphans, max(0, min(most, room)))]:  # a lower max_running holds for them too
            assignments.append(self._orphans.pop(ticket_id))
            self._owners[ticket_id] = owner
        while len(assignments) < most and (new := self._buffer.admit()) is not None:
            prompt = self._stream.next()
            self._prompts[new.ticket_id], self._owners[new.ticket_id] = prompt, owner
            assignments.append(Assignment(new, prompt))
        return assignments

    def commit(self, ticket_id: int, group: TensorDictBase) -> bool:
        """Ends a ticket with its scored group. False if nobody will train on it.

        That is so if dynamic sampling refused it: its prompt does not come back, as it would most likely be refused
        again, and again. Or if the ticket was cancelled meanwhile, dropped or its owner lost: then its prompt is
        somebody else's already, and only the lengths are counted. Raises as :meth:`RolloutBuffer.commit`.
        """
        if ticket_id in self._cancelled:
            self._count_late(self._cancelled.pop(ticket_id), group)
            return False
        reason = None if self._sampling is None else self._sampling.judge(group, self._buffer.committed)
        if reason is None:
            self._buffer.commit(ticket_id, group)
        else:
            self._buffer.reject(ticket_id, group, reason)
        self._owners.pop(ticket_id, None)
        self._orphans.pop(ticket_id, None)
        self._drops.pop(self._prompts[ticket_id].group_id, None)
        lengths = response_lengths(group)
        self._lengths.add(GENERATED, lengths)
        if reason is not None:
            self._lengths.add(REFUSED, lengths)
            del self._prompts[ticket_id]
        elif self._watch is not None and self._buffer.ready <= self._buffer.groups_per_batch:
            self._watch.reset()  # the batch has come a step nearer
        if self._sampling is not None:
            self._sampling.count(reason)
        return reason is None

    def refund(self, ticket_id: int, reason: str) -> None:
        """Ends a ticket without a group; its prompt comes first again, under its group id. Nothing if cancelled."""
        if self._cancelled.pop(ticket_id, None) is None:
            self._give_back(ticket_id, reason)

    def lose(self, owner: str) -> list[int]:
        """Gives back the running tickets of an owner that died, and returns them; it gets no more."""
        self._lost.add(owner)
        tickets = [ticket_id for ticket_id, whose in self._owners.items() if whose == owner]
        for ticket_id in tickets:
            self._give_back(ticket_id, WORKER_LOST)
            self._cancelled[ticket_id] = WORKER_LOST
        return tickets

    def drop_overdue(self, now: float) -> tuple[int, str] | None:
        """While the learner waits for a batch: gives back the ticket that has held it up for too long.

        A ticket is dropped only if the batch cannot come without it (:meth:`RolloutBuffer.blocker`), somebody is on it,
        and its prompt has been dropped fewer than ``max_drops`` times. The time counts from the first question after
        which it, and nobody else, was waited for; a group that brings the batch nearer starts it anew.

        Returns its id and its owner, who is to cancel it and to report :meth:`dropped`. ``now``: seconds, steady clock.
        """
        ticket = self._droppable()
        if self._watch is None or not self._watch.overdue(ticket, now):
            return None
        assert ticket is not None
        self._watch.reset()
        return ticket.ticket_id, self.drop(ticket.ticket_id)

    def drop(self, ticket_id: int) -> str:
        """Gives back a running ticket as a straggler; returns its owner, who is to cancel it."""
        owner, group_id = self._owners[ticket_id], self._prompts[ticket_id].group_id
        self._drops[group_id] = self._drops.get(group_id, 0) + 1
        self._drop_count += 1
        self._give_back(ticket_id, STRAGGLER)
        self._cancelled[ticket_id] = STRAGGLER
        return owner

    def seconds_until_overdue(self, now: float) -> float | None:
        """When to ask :meth:`drop_overdue` again; None: after the next admission, commit or refund."""
        if self._watch is None:
            return None
        self._watch.overdue(self._droppable(), now)
        return self._watch.remaining(now)

    def dropped(self, ticket_id: int, lengths: Sequence[int]) -> None:
        """A dropped ticket was cancelled: counts its responses, [G] tokens when they were cut."""
        del self._cancelled[ticket_id]  # its group will not come late any more
        self._lengths.add(DROPPED, lengths)

    def take(self) -> Batch | None:
        """The next batch for the learner, or None; see :meth:`RolloutBuffer.take`.

        Raises ``RunError`` if there is none because dynamic sampling has refused too many groups in a row. The learner
        is told, and not who commits: no batch is on its way then, so the state can be saved.
        """
        batch = self._buffer.take()
        if batch is not None:
            for ticket_id in batch.tickets:
                del self._prompts[ticket_id]
            self._lengths.add(TRAINED, response_lengths(batch.groups))
            if self._watch is not None:
                self._watch.reset()
        elif self._sampling is not None and not self.closed:
            self._sampling.check_patience()
        return batch

    def publish(self) -> int:
        """Counts a publication and returns the new version. Only after every engine was handed its weights."""
        return self._buffer.publish()

    def close(self) -> None:
        """Ends admission and drops."""
        self._buffer.close()

    @property
    def closed(self) -> bool:
        return self._buffer.closed

    @property
    def published(self) -> int:
        return self._buffer.published

    def why_waiting(self) -> str:
        """One line: what the learner's next batch waits for."""
        why = self._buffer.why_waiting()
        if self._sampling is None or not self._sampling.in_a_row:
            return why
        return f"{why}; dynamic sampling refused the last {self._sampling.in_a_row} groups"

    def counters(self) -> FlowCounters:
        """Where tickets and prompts stand."""
        sampling = self._sampling
        reasons = {} if sampling is None else {ALL_RIGHT: 0, ALL_WRONG: 0}
        return FlowCounters(
            tickets=self._buffer.ticket_counts(),
            refund_reasons=reasons | self._buffer.refund_reasons,
            prompts_left_out=self._stream.left_out,
            drops=self._drop_count,
            lengths=self._lengths.counts(),
        )

    def state_dict(self, carried: Mapping[int, Sequence[Response]] | None = None) -> State:
        """All of it, without changing it; what a late owner of a cancelled ticket may still say is not in it.

        Args:
            carried: what there is of running tickets so far; tickets that do not run are left out.

        Raises:
            PublicationError: between take and publish.
        """
        buffer = self._buffer.state_dict()
        running = {ticket.ticket_id for ticket in self._buffer.running()}
        known = {key: orphan.carried for key, orphan in self._orphans.items()} | dict(carried or {})
        partial = pack_by_ticket({key: known[key] for key in sorted(running & known.keys())})
        data: dict[str, Any] = {
            "stream": self._stream.state_dict(),
            "buffer": buffer.data,
            "prompts": {str(key): prompt_to_json(prompt) for key, prompt in self._prompts.items()},
            "sampling": None if self._sampling is None else self._sampling.state_dict(),
            "drops": {str(group_id): count for group_id, count in self._drops.items()},
            "drop_count": self._drop_count,
            "lengths": self._lengths.state_dict(),
            "carried": partial.data,
        }
        return State(data, buffer.nested("buffer") | partial.nested("carried"))

    def load_state_dict(self, state: State, owned: Collection[int] = (), owner: str = "") -> None:
        """Goes on from a saved state, in a flow that has given no ticket.

        Tickets that the buffer cannot keep (:meth:`RolloutBuffer.load_state_dict`, which says what is raised) are
        refunded, their prompts first again.

        Args:
            state: what :meth:`state_dict` gave.
            owned: running tickets that ``owner`` goes on with; the other running ones are for :meth:`admit` to give.
            owner: as for :meth:`admit`.
        """
        data = state.data
        self._stream.load_state_dict(data["stream"])
        refunded = self._buffer.load_state_dict(State(data["buffer"], under(state.tensors, "buffer")))
        self._prompts = {int(key): prompt_from_json(prompt) for key, prompt in data["prompts"].items()}
        if self._sampling is not None and data["sampling"] is not None:
            self._sampling.load_state_dict(data["sampling"])
        self._drops = {int(group_id): count for group_id, count in data["drops"].items()}
        self._drop_count = data["drop_count"]
        self._lengths.load_state_dict(data["lengths"])
        for ticket in refunded:
            self._stream.put_back(self._prompts.pop(ticket.ticket_id))
        carried = unpack_by_ticket(State(data["carried"], under(state.tensors, "carried")))
        for ticket in self._buffer.running():
            key = ticket.ticket_id
            if key in owned:
                self._owners[key] = owner
            else:
                self._orphans[key] = Assignment(ticket, self._prompts[key], carried.get(key, ()))

    def _droppable(self) -> Ticket | None:
        if self.closed:
            return None
        ticket = self._buffer.blocker()
        if ticket is None or ticket.ticket_id not in self._owners:
            return None
        spared = self._drops.get(self._prompts[ticket.ticket_id].group_id, 0) >= self._max_drops
        return None if spared else ticket

    def _give_back(self, ticket_id: int, reason: str) -> None:
        self._buffer.refund(ticket_id, reason)
        self._owners.pop(ticket_id, None)
        self._orphans.pop(ticket_id, None)
        self._stream.put_back(self._prompts.pop(ticket_id))

    def _count_late(self, reason: str, group: TensorDictBase) -> None:
        """A group that was finished though its ticket was cancelled: generated, and dropped if that is why."""
        lengths = response_lengths(group)
        self._lengths.add(GENERATED, lengths)
        if reason == STRAGGLER:
            self._lengths.add(DROPPED, lengths)
