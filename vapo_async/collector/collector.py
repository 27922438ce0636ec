"""Turns tickets into finished groups. Knows the engine and the tokenizer; never waits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from tensordict import LazyStackedTensorDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.engine import BroadcastEngine, Engine, ExactEngine, GenerationRequest
from vapo_async.responses import copy_of, pack_responses, unpack_responses
from vapo_async.schema import (
    Prompt,
    Response,
    Ticket,
    make_trajectory,
    prompt_from_json,
    prompt_to_json,
    stack_group,
)
from vapo_async.state import State, under


@dataclass
class FinishedGroup:
    """G responses to one prompt, not scored yet. ``texts[i]`` is the decoded response of ``group[i]``."""

    ticket: Ticket
    prompt: Prompt
    group: LazyStackedTensorDict
    texts: list[str]


@dataclass
class _RunningGroup:
    ticket: Ticket
    prompt: Prompt
    responses: dict[int, Response] = field(default_factory=dict)


class Collector:
    """Keeps the groups in flight and gathers the engine's completions into them.

    Args:
        engine: generates.
        tokenizer: decodes responses for the verifier.
        group_size: G.
        max_response_tokens: length limit of a response, the end token included.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, group_size: int, max_response_tokens: int
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._group_size = group_size
        self._max_response_tokens = max_response_tokens
        self._running: dict[int, _RunningGroup] = {}

    @property
    def busy(self) -> bool:
        """Whether a decode step would do anything."""
        return self._engine.num_unfinished > 0

    @property
    def unfinished_responses(self) -> int:
        return self._engine.num_unfinished

    @property
    def capacity(self) -> int:
        """Responses that the engine decodes together."""
        return self._engine.capacity

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled so far, those of unfinished responses included."""
        return self._engine.generated_tokens

    @property
    def tickets(self) -> list[int]:
        """Ids of the groups in flight, in the order in which they were started."""
        return list(self._running)

    def start(self, ticket: Ticket, prompt: Prompt, carried: Sequence[Response] = ()) -> None:
        """Submits a group. The engine must have the admission's weights: older ones would break the staleness bound.

        Args:
            ticket: the admission; not in flight here.
            prompt: what to generate for.
            carried: what was generated under this ticket before, by whichever engine. Its tokens keep their versions,
                so that the group stays as old as it was; they may be older than the engine's weights, and newer.

        Raises:
            RuntimeError: the engine's weights are older than the ticket.
            ValueError: the ticket is in flight, or a carried response is not of this ticket.
        """
        if self._engine.version < ticket.version:
            raise RuntimeError(
                f"ticket {ticket.ticket_id} was admitted at version {ticket.version}, "
                f"the engine still holds {self._engine.version}: pull the weights before starting tickets"
            )
        if ticket.ticket_id in self._running:
            raise ValueError(f"ticket {ticket.ticket_id} is in flight already")
        oldest = min((version for response in carried for version in response.versions), default=ticket.version)
        if oldest < ticket.version:
            raise ValueError(
                f"ticket {ticket.ticket_id} was admitted at version {ticket.version}, "
                f"a carried token is of version {oldest}: older than the ticket allows"
            )
        self._engine.submit(
            GenerationRequest(
                ticket.ticket_id, prompt.token_ids, self._group_size, self._max_response_tokens, tuple(carried)
            )
        )
        self._running[ticket.ticket_id] = _RunningGroup(ticket, prompt)

    def step(self) -> list[FinishedGroup]:
        """One decode step; returns the groups that it completed."""
        finished = []
        for completion in self._engine.step():
            running = self._running[completion.request_id]
            running.responses[completion.response.sample_index] = completion.response
            if len(running.responses) == self._group_size:
                del self._running[completion.request_id]
                finished.append(self._finish(running))
        return finished

    def interrupt(self, ticket_id: int) -> list[Response]:
        """Takes a group out of the engine, to be started again with ``carried``, here or elsewhere.

        Returns its G responses, finished ones and what there is of the others; nothing if it is not in flight here.
        """
        running = self._running.pop(ticket_id, None)
        if running is None:
            return []
        aborted = [completion.response for completion in self._engine.abort(ticket_id)]
        return _in_order([*running.responses.values(), *aborted])

    def cancel(self, ticket_id: int) -> list[int]:
        """Ends a group; returns the tokens of each of its G responses, or nothing if it is not in flight here."""
        return [len(response.token_ids) for response in self.interrupt(ticket_id)]

    def partial_groups(self) -> dict[int, list[Response]]:
        """By ticket id: copies of the G responses of every group in flight, as :meth:`interrupt` would return them."""
        return {
            ticket_id: _in_order([*map(copy_of, running.responses.values()), *self._engine.partial(ticket_id)])
            for ticket_id, running in self._running.items()
        }

    def state_dict(self) -> State:
        """Between two decode steps: the groups in flight with their prompts and finished responses, and the engine."""
        assert isinstance(self._engine, ExactEngine), "the configuration is checked for it"
        engine = self._engine.state_dict()
        finished = pack_responses([r for running in self._running.values() for r in running.responses.values()])
        groups = [
            {
                "ticket_id": running.ticket.ticket_id,
                "version": running.ticket.version,
                "prompt": prompt_to_json(running.prompt),
                "finished": len(running.responses),
            }
            for running in self._running.values()
        ]
        return State(
            {"groups": groups, "finished": finished.data, "engine": engine.data},
            finished.nested("finished") | engine.nested("engine"),
        )

    def load_state_dict(self, state: State) -> None:
        """Goes on where :meth:`state_dict` was called; the engine is idle and has the weights of that moment.

        Raises:
            ConfigError: a saved response is longer than the engine allows.
        """
        assert isinstance(self._engine, ExactEngine), "the configuration is checked for it"
        self._engine.load_state_dict(State(state.data["engine"], under(state.tensors, "engine")))
        finished = iter(unpack_responses(State(state.data["finished"], under(state.tensors, "finished"))))
        for group in state.data["groups"]:
            ticket = Ticket(group["ticket_id"], group["version"])
            responses = {r.sample_index: r for r in islice(finished, group["finished"])}
            self._running[ticket.ticket_id] = _RunningGroup(ticket, prompt_from_json(group["prompt"]), responses)

    def seed(self, seed: int) -> None:
        """Starts the engine's sampling generator anew."""
        self._engine.seed(seed)

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Swaps the weights under the responses in flight."""
        self._engine.load_weights(version, tensors)

    def receive_weights(self, version: int, update: Mapping[str, Any], join: Mapping[str, Any] | None) -> None:
        """Takes part in a broadcast: see :meth:`.engine.BroadcastEngine.receive_weights`."""
        assert isinstance(self._engine, BroadcastEngine), "the configuration is checked for it"
        self._engine.receive_weights(version, update, join)

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def _finish(self, running: _RunningGroup) -> FinishedGroup:
        responses: Sequence[Response] = [running.responses[i] for i in range(self._group_size)]
        group = stack_group([make_trajectory(running.prompt, running.ticket, r) for r in responses])
        texts = self._tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        return FinishedGroup(running.ticket, running.prompt, group, texts)


def _in_order(responses: Sequence[Response]) -> list[Response]:
    return sorted(responses, key=lambda response: response.sample_index)
