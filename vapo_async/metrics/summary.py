"""``summary.json``: the run in numbers, for people and scripts."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"


@dataclass
class TicketCounts:
    """Where the tickets went; charged = committed + refunded + outstanding."""

    charged: int = 0
    committed: int = 0
    refunded: int = 0
    outstanding: int = 0

    @property
    def balanced(self) -> bool:
        """Every ticket ended exactly once or is still out."""
        return self.charged == self.committed + self.refunded + self.outstanding


@dataclass
class LengthCounts:
    """Responses of one kind."""

    responses: int
    mean: float | None
    """Tokens; None without any response."""


@dataclass
class Summary:
    """Everything that ``summary.json`` holds; accuracies are avg@k on the held-out problems, in [0, 1]."""

    base_accuracy: float
    final_accuracy: float
    best_accuracy: float
    wall_s: float
    generated_tokens: int
    trained_tokens: int
    versions: int
    optimizer_steps: int
    max_staleness: int
    """The bound S; ``max_age`` never exceeds it."""
    max_age: int
    mean_age: float
    age_histogram: dict[str, int]
    """Age (versions) → groups trained on."""
    seed: int
    tickets: TicketCounts
    name: str = ""
    status: str = "finished"
    """``finished`` or ``interrupted``."""
    base_stderr: float | None = None
    """Standard error of ``base_accuracy``, clustered over problems."""
    final_stderr: float | None = None
    evaluation: dict[str, int] = field(default_factory=dict)
    """``problems`` and ``samples`` of the first and last evaluation."""
    refund_reasons: dict[str, int] = field(default_factory=dict)
    """Why tickets ended without a group."""
    lengths: dict[str, LengthCounts] = field(default_factory=dict)
    """The length-bias audit of the whole run, by kind."""
    length_bias: float | None = None
    """Mean length trained on − mean length generated, tokens."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Where time went, by the names in :data:`vapo_async.metrics.names.SECONDS`."""
    restarts: dict[str, int] = field(default_factory=dict)
    """Dead processes that were replaced, by stage."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else a launcher has to tell."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; numbers that are not finite become null, which every JSON reader understands."""
        return {name: _finite(value) for name, value in dataclasses.asdict(self).items()}


def write_summary(summary: Summary, run_dir: Path) -> Path:
    """Writes it beside the old one and renames: a reader never sees half a file."""
    path = run_dir / SUMMARY_FILE
    temporary = path.with_name(f".{SUMMARY_FILE}.{os.getpid()}")
    temporary.write_text(json.dumps(summary.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def read_summary(run_dir: Path) -> Summary:
    """What :func:`write_summary` wrote."""
    data = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    lengths = {kind: LengthCounts(**counts) for kind, counts in data.get("lengths", {}).items()}
    return Summary(**{**data, "tickets": TicketCounts(**data["tickets"]), "lengths": lengths})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
