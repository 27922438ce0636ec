"""The contract of a rollout engine. Engines know tokens, never prompts, rewards or tickets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vapo_async.schema import Response


@dataclass(frozen=True)
class GenerationRequest:
    """``num_samples`` responses to one prompt."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """One finished response of a request."""

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
