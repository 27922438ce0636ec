"""What the flow of a run has done and cost so far: pure sums, their differences, and their JSON."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

K = TypeVar("K")
N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens of some responses."""

    responses: int = 0
    tokens: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    """Responses by upper bound in tokens, 1, 2, 4, …: the smallest power of two that is not below the length."""

    @property
    def mean(self) -> float:
        """Tokens per response; NaN without any."""
        return self.tokens / self.responses if self.responses else math.nan

    def since(self, before: "Lengths") -> "Lengths":
        """What was added after ``before``."""
        histogram = {bound: int(n) for bound, n in differences(self.histogram, before.histogram).items() if n}
        return Lengths(self.responses - before.responses, self.tokens - before.tokens, histogram)

    def to_json(self) -> dict[str, Any]:
        """JSON-able: bounds as strings, in order."""
        histogram = {str(bound): n for bound, n in sorted(self.histogram.items())}
        return {"responses": self.responses, "tokens": self.tokens, "histogram": histogram}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`."""
        return cls(data["responses"], data["tokens"], {int(bound): n for bound, n in data["histogram"].items()})


@dataclass
class FlowSums:
    """Sums over the whole run, resumed parts included."""

    generated_tokens: int = 0
    """Response tokens that the engines sampled, evaluation left out."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where time went, by the names in :data:`vapo_async.metrics.names.SECONDS`."""
    restarts: dict[str, int] = field(default_factory=dict)
    """Dead processes that were replaced, by stage."""
    verifier: dict[str, int] = field(default_factory=dict)
    """The verifier's own counters."""
    committed: int = 0
    """Tickets that ended with a group."""
    refunds: dict[str, int] = field(default_factory=dict)
    """Tickets that ended without one, by reason."""
    lengths: dict[str, Lengths] = field(default_factory=dict)
    """The length-bias audit, by kind."""

    def since(self, before: "FlowSums") -> "FlowSums":
        """What was added after ``before``; names that are new count from 0."""
        none = Lengths()
        return FlowSums(
            generated_tokens=self.generated_tokens - before.generated_tokens,
            seconds=differences(self.seconds, before.seconds),
            restarts=differences(self.restarts, before.restarts),
            verifier=differences(self.verifier, before.verifier),
            committed=self.committed - before.committed,
            refunds=differences(self.refunds, before.refunds),
            lengths={kind: sums.since(before.lengths.get(kind, none)) for kind, sums in self.lengths.items()},
        )

    def copy(self) -> "FlowSums":
        """One that does not change with this one."""
        return FlowSums.from_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        copied = {name: dict(value) if isinstance(value, dict) else value for name, value in plain.items()}
        return copied | {"lengths": {kind: sums.to_json() for kind, sums in self.lengths.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_json`; a missing or unknown name is an error."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if data.keys() != expected:
            raise ValueError(f"saved sums of the flow do not fit: {', '.join(sorted(data.keys() ^ expected))}")
        copied = {name: dict(value) if isinstance(value, dict) else value for name, value in data.items()}
        return cls(**copied | {"lengths": {kind: Lengths.from_json(s) for kind, s in data["lengths"].items()}})


def length_bias(lengths: Mapping[str, Lengths]) -> float:
    """Mean length trained on − mean length generated, tokens; NaN while either is unknown.

    Below 0 the flow prefers short answers. Responses still on their way, which were generated but not trained on, count
    too, so that a short stretch says little and a whole run a lot.
    """
    none = Lengths()
    return lengths.get("trained", none).mean - lengths.get("generated", none).mean


def differences(now: Mapping[K, N], before: Mapping[K, N]) -> dict[K, N]:
    """``now − before`` by key; a key that ``before`` lacks counts from 0."""
    return {key: value - before.get(key, 0) for key, value in now.items()}


def increases(now: Mapping[K, N], before: Mapping[K, N]) -> dict[K, N]:
    """What counters gained. One that fell, as where a process was replaced by a new one, gained nothing."""
    return {key: value if value > 0 else value - value for key, value in differences(now, before).items()}


def plus(sums: Mapping[K, N], more: Mapping[K, N]) -> dict[K, N]:
    """The sum by key; a missing key counts as 0."""
    return {key: sums.get(key, 0) + more.get(key, 0) for key in {**sums, **more}}
