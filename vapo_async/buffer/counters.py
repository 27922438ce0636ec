"""What became of tickets and responses, as others read it."""

from dataclasses import dataclass, field

from vapo_async.metrics.flow_sums import Lengths


@dataclass(frozen=True)
class FlowCounters:
    """Cumulative, over resumes too."""

    tickets: dict[str, int] = field(default_factory=dict)
    """charged = committed + refunded + outstanding."""
    refund_reasons: dict[str, int] = field(default_factory=dict)
    """Refunds by reason."""
    prompts_left_out: int = 0
    """Training problems met so far whose prompt is too long."""
    drops: int = 0
    """Stragglers that were dropped."""
    lengths: dict[str, Lengths] = field(default_factory=dict)
    """Responses by what became of them: see :mod:`vapo_async.buffer.lengths`."""
