"""Tickets and their prompts together: what admission hands out, and what a refund or a checkpoint gives back.

A state machine like the two parts that it holds: it never waits, one thread at a time.
"""

from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDictBase

from vapo_async.buffer import ALL_RIGHT, ALL_WRONG, Batch, DynamicSampling, RolloutBuffer
from vapo_async.prompts.stream import PromptStream
from vapo_async.schema import Prompt, Response, Ticket


@dataclass(frozen=True)
class Assignment:
    """The right and the order to generate one group."""

    ticket: Ticket
    prompt: Prompt
    carried: tuple[Response, ...] = ()
    """What a run that is resumed had of it already; ``ABORTED`` ones are gone on with."""


@dataclass(frozen=True)
class FlowCounters:
    """What became of the tickets so far."""

    tickets: dict[str, int] = field(default_factory=dict)
    """charged = committed + refunded + outstanding, over resumes too."""
    refund_reasons: dict[str, int] = field(default_factory=dict)
    """Refunds by reason, over resumes too."""
    rejected_responses: int = 0
    """Responses that dynamic sampling refused, since this process started."""
    rejected_tokens: int = 0
    """Their generated tokens."""
    prompts_left_out: int = 0
    """Training problems met so far whose prompt is too long."""


class Flow:
    """Prompts → tickets → buffer. Every ticket has a prompt until its group is trained on or refunded.

    Args:
        stream: gives prompts, returned ones first.
        buffer: admission, deadlines, storage.
        sampling: refuses groups that are all right or all wrong; None takes every group.
    """

    def __init__(self, stream: PromptStream, buffer: RolloutBuffer, sampling: DynamicSampling | None = None) -> None:
        self._stream, self._buffer, self._sampling = stream, buffer, sampling
        self._prompts: dict[int, Prompt] = {}  # by ticket, running and ready

    def admit(self, most: int) -> list[Assignment]:
        """Up to ``most`` assignments; fewer, or none, while the lead is spent or the flow is closed."""
        assignments: list[Assignment] = []
        while len(assignments) < most and (ticket := self._buffer.admit()) is not None:
            prompt = self._stream.next()
            self._prompts[ticket.ticket_id] = prompt
            assignments.append(Assignment(ticket, prompt))
        return assignments

    def commit(self, ticket_id: int, group: TensorDictBase) -> bool:
        """Ends a ticket with its scored group. False if dynamic sampling refused it: then the ticket is refunded.

        The prompt of a refused group does not come back: it would most likely be refused again, and again.
        """
        if self._sampling is None:
            self._buffer.commit(ticket_id, group)
            return True
        reason = self._sampling.judge(group, self._buffer.committed)
        if reason is None:
            self._buffer.commit(ticket_id, group)
        else:
            self._buffer.reject(ticket_id, group, reason)
            del self._prompts[ticket_id]
        self._sampling.count(group, reason)
        return reason is None

    def refund(self, ticket_id: int, reason: str) -> None:
        """Ends a ticket without a group; its prompt comes first again, under its group id."""
        self._buffer.refund(ticket_id, reason)
        self._stream.put_back(self._prompts.pop(ticket_id))

    def take(self) -> Batch | None:
        """The next batch for the learner, or None; see :meth:`RolloutBuffer.take`.

        Raises ``RunError`` if there is none because dynamic sampling has refused too many groups in a row. The learner
        is told, and not who commits: no batch is on its way then, so the state can be saved.
        """
        batch = self._buffer.take()
        if batch is not None:
            held = {ticket.ticket_id for ticket in self._buffer.unserved()}
            self._prompts = {key: prompt for key, prompt in self._prompts.items() if key in held}
        elif self._sampling is not None and not self.closed:
            self._sampling.check_patience()
        return batch

    def publish(self) -> int:
        """Counts a publication and returns the new version. Only after every engine was handed its weights."""
        return self._buffer.publish()

    def close(self) -> None:
        """Ends admission."""
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
            rejected_responses=0 if sampling is None else sampling.rejected_responses,
            rejected_tokens=0 if sampling is None else sampling.rejected_tokens,
            prompts_left_out=self._stream.left_out,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. Unserved tickets count as refunded and their prompts stand first in the stream."""
        unserved = [self._prompts[ticket.ticket_id] for ticket in self._buffer.unserved()]
        return {"stream": self._stream.state_dict(unserved), "buffer": self._buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._buffer.load_state_dict(state["buffer"])
