"""The contract of a rollout engine. Engines know tokens, never prompts, rewards or tickets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vapo_async.schema import Response
from vapo_async.state import State


@dataclass(frozen=True)
class GenerationRequest:
    """``num_samples`` responses to one prompt."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    """Limit of one response, its carried tokens included."""
    carried: tuple[Response, ...] = ()
    """Of some of the samples: what another engine, or this one before an :meth:`Engine.abort`, generated. ``ABORTED``
    ones are gone on with, their tokens keep their log-probs and versions; finished ones come back as they are."""


@dataclass(frozen=True)
class Completion:
    """A response of a request that ended; each sample of a request comes back exactly once."""

    request_id: int
    response: Response


class Engine(Protocol):
    """Generates with continuous batching; weights change between decode steps, under responses in flight.

    Every token carries the log-prob of the distribution that it was sampled from and the version of the weights that
    made that distribution.
    """

    @property
    def version(self) -> int:
        """Version of the weights in use."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Responses waiting or in flight."""
        ...

    @property
    def capacity(self) -> int:
        """Responses decoded together."""
        ...

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled so far."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request. Raises ``ValueError`` if prompt and limit together exceed the engine's length."""
        ...

    def step(self) -> list[Completion]:
        """One decode step of every response in flight; returns those that it finished. No-op when idle."""
        ...

    def seed(self, seed: int) -> None:
        """Starts the sampling generator anew."""
        ...

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Takes new weights between two decode steps; ``None`` means that the weights of ``version`` are the same."""
        ...

    def abort(self, request_id: int) -> list[Completion]:
        """Ends a request; its unfinished responses come back with what they have, finish reason ABORTED."""
        ...

    def partial(self, request_id: int) -> list[Response]:
        """Copies of a request's unfinished responses as they stand, finish reason ABORTED; generation goes on."""
        ...

    def state_dict(self) -> State:
        """Between two decode steps: everything that the next tokens depend on but the weights and their version.

        A new engine that was given the same weights and this state goes on bit for bit, where the engine is
        deterministic.
        """
        ...

    def load_state_dict(self, state: State) -> None:
        """Into an engine that has not been given a request, after :meth:`load_weights`."""
        ...
