"""Tickets and their prompts together: what admission hands out, and what a refund or a checkpoint gives back.

A state machine like the two parts that it holds: it never waits, one thread at a time.
"""

from dataclasses import dataclass
from typing import Any

from tensordict import TensorDictBase

from vapo_async.buffer import Batch, RolloutBuffer
from vapo_async.prompts.stream import PromptStream
from vapo_async.schema import Prompt, Ticket


@dataclass(frozen=True)
class Assignment:
    """The right and the order to generate one group."""

    ticket: Ticket
    prompt: Prompt


class Flow:
    """Prompts → tickets → buffer. Every ticket has a prompt until its group is trained on or refunded.

    Args:
        stream: gives prompts, returned ones first.
        buffer: admission, deadlines, storage.
    """

    def __init__(self, stream: PromptStream, buffer: RolloutBuffer) -> None:
        self._stream, self._buffer = stream, buffer
        self._prompts: dict[int, Prompt] = {}  # by ticket, running and ready

    def admit(self, most: int) -> list[Assignment]:
        """Up to ``most`` assignments; fewer, or none, while the lead is spent or the flow is closed."""
        assignments: list[Assignment] = []
        while len(assignments) < most and (ticket := self._buffer.admit()) is not None:
            prompt = self._stream.next()
            self._prompts[ticket.ticket_id] = prompt
            assignments.append(Assignment(ticket, prompt))
        return assignments

    def commit(self, ticket_id: int, group: TensorDictBase) -> None:
        """Ends a ticket with its scored group."""
        self._buffer.commit(ticket_id, group)

    def refund(self, ticket_id: int, reason: str) -> None:
        """Ends a ticket without a group; its prompt comes first again, under its group id."""
        self._buffer.refund(ticket_id, reason)
        self._stream.put_back(self._prompts.pop(ticket_id))

    def take(self) -> Batch | None:
        """The next batch for the learner, or None; see :meth:`RolloutBuffer.take`."""
        batch = self._buffer.take()
        if batch is not None:
            held = {ticket.ticket_id for ticket in self._buffer.unserved()}
            self._prompts = {key: prompt for key, prompt in self._prompts.items() if key in held}
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
        return self._buffer.why_waiting()

    @property
    def prompts_left_out(self) -> int:
        """Training problems met so far whose prompt is too long."""
        return self._stream.left_out

    def ticket_counts(self) -> dict[str, int]:
        """charged = committed + refunded + outstanding."""
        return self._buffer.ticket_counts()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. Unserved tickets count as refunded and their prompts stand first in the stream."""
        unserved = [self._prompts[ticket.ticket_id] for ticket in self._buffer.unserved()]
        return {"stream": self._stream.state_dict(unserved), "buffer": self._buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state["stream"])
        self._buffer.load_state_dict(state["buffer"])
