"""The contract of a rollout engine. Engines know tokens, never prompts, rewards or tickets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vapo_async.config import RunError
from vapo_async.schema import Response
from vapo_async.state import State


class EngineDiedError(RunError):
    """The process that an engine runs in has ended: the engine is of no more use, another one may be."""


@dataclass(frozen=True)
class GenerationRequest:
    """``num_samples`` responses to one prompt."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    """Limit of one response, its carried tokens included."""
    carried: tuple[Response, ...] = ()
    """Of some of the samples: what another engine, or this one before an :meth:`Engine.abort`, generated.

    ``ABORTED`` ones are gone on with: their tokens keep their log-probs and versions, their keys are computed with the
    present weights. One that was cut exactly at its end token or at the limit, and all finished ones, take no decode
    step: they come back with the next :meth:`Engine.step`.
    """


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
        """Responses that have not come back: waiting, in flight, or carried and finished."""
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
        """Queues a request.

        Raises:
            ValueError: prompt and limit together exceed the engine's length, the prompt is empty, or a carried
                response has a sample index out of range or twice, lists of unequal length or too many tokens.
        """
        ...

    def step(self) -> list[Completion]:
        """One decode step of every response in flight; returns those that it finished. No-op when idle.

        An engine in a process of its own makes its steps unasked: this waits for the end of the next one.

        Raises:
            EngineDiedError: the engine's process is gone.
        """
        ...

    def seed(self, seed: int) -> None:
        """Starts the sampling generator anew; an engine whose schedule depends on timing draws other tokens still."""
        ...

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Takes new weights between two decode steps; ``None`` means that the weights of ``version`` are the same."""
        ...

    def abort(self, request_id: int) -> list[Completion]:
        """Ends a request and frees its slots; returns what :meth:`partial` does. Nothing for an unknown request."""
        ...

    def partial(self, request_id: int) -> list[Response]:
        """Copies of a request's responses that have not come back yet; generation goes on.

        Unfinished ones have finish reason ABORTED, with no token yet where they wait; carried ones that came finished
        have their own.
        """
        ...

    def close(self) -> None:
        """Ends whatever runs outside of this process; what is unfinished is lost."""
        ...


@runtime_checkable
class BroadcastEngine(Engine, Protocol):
    """An engine that can take weights from the learner directly, together with others."""

    def receive_weights(self, version: int, update: Mapping[str, Any], join: Mapping[str, Any] | None) -> None:
        """Takes part in a broadcast between two decode steps; returns when the new weights are in use.

        Args:
            version: of the weights.
            update: ``names``, ``dtypes`` and ``shapes`` of what is sent.
            join: where learner and engines meet, if they have to meet anew.

        Raises:
            RunError: the broadcast failed; the engine is of no more use.
        """
        ...


@runtime_checkable
class ExactEngine(Engine, Protocol):
    """An engine whose next tokens are a function of its state: a run can be resumed bit for bit."""

    def state_dict(self) -> State:
        """Between two decode steps: everything that the next tokens depend on but the weights and their version.

        A new engine with the same weights, version, settings and kind of device goes on from this state bit for bit.
        The tensors are copies.
        """
        ...

    def load_state_dict(self, state: State) -> None:
        """Into an idle engine, after :meth:`load_weights`.

        Raises:
            ConfigError: a saved response is longer than the engine allows.
        """
        ...
