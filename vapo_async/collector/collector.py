"""Turns tickets into finished groups. Knows the engine and the tokenizer; never waits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tensordict import LazyStackedTensorDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.engine import Engine, GenerationRequest
from vapo_async.schema import Prompt, Response, Ticket, make_trajectory, stack_group


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

    def start(self, ticket: Ticket, prompt: Prompt) -> None:
        """Submits a group. The engine must have the admission's weights: older ones would break the staleness bound."""
        if self._engine.version < ticket.version:
            raise RuntimeError(
                f"ticket {ticket.ticket_id} was admitted at version {ticket.version}, "
                f"the engine still holds {self._engine.version}: pull the weights before starting tickets"
            )
        self._running[ticket.ticket_id] = _RunningGroup(ticket, prompt)
        self._engine.submit(
            GenerationRequest(ticket.ticket_id, prompt.token_ids, self._group_size, self._max_response_tokens)
        )

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

    def seed(self, seed: int) -> None:
        """Starts the engine's sampling generator anew."""
        self._engine.seed(seed)

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Swaps the weights under the responses in flight."""
        self._engine.load_weights(version, tensors)

    def _finish(self, running: _RunningGroup) -> FinishedGroup:
        responses: Sequence[Response] = [running.responses[i] for i in range(self._group_size)]
        group = stack_group([make_trajectory(running.prompt, running.ticket, r) for r in responses])
        texts = self._tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)
        return FinishedGroup(running.ticket, running.prompt, group, texts)
