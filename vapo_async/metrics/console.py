"""What the user sees while a run goes on: one live line on a terminal, a plain line per step elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

ETA_WINDOW = 10  # batches that the estimate looks back on


class Phase(Enum):
    """What a batch trains."""

    value_pretraining = "value pretraining"
    policy = "policy"


@dataclass(frozen=True)
class StepRow:
    """One trained batch, as the live line shows it. None = not known (yet): left out."""

    phase: Phase
    step: int
    """1 … ``total``, within the phase."""
    total: int
    remaining: int
    """Batches still to come, all phases: what the ETA counts."""
    reward: float
    response_length: float
    age_mean: float
    age_max: int
    tokens_per_s: float
    generation_wait: float
    """Share of the step's time in which generation waited, in [0, 1]."""
    learning_wait: float
    heldout: float | None = None
    """Latest held-out accuracy, in [0, 1]."""
    heldout_base: float | None = None
    explained_variance: float | None = None


class Eta:
    """Seconds to the end, from the mean duration of the last batches (the first one ends a start-up of any length)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=ETA_WINDOW + 1)

    def update(self, remaining: int) -> float | None:
        """A batch has ended and ``remaining`` are to come; None before the second batch."""
        self._times.append(self._clock())
        if len(self._times) < 2:
            return None
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1) * remaining


class Console:
    """The live line; use as a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._tty = self._stream.isatty()
        # Away from a terminal rich would fold at 80 columns, which cuts paths in two.
        self._rich = RichConsole(file=self._stream, width=None if self._tty else 240, highlight=False)
        self._live: Live | None = None
        self._eta = Eta(clock)

    def step(self, row: StepRow) -> None:
        """Shows a finished batch."""
        line = format_row(row, self._eta.update(row.remaining))
        if not self._tty:
            print(line, file=self._stream, flush=True)
            return
        if self._live is None:
            self._live = Live(console=self._rich, refresh_per_second=4)
            self._live.start()
        self._live.update(Text(line), refresh=True)

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self._tty:
            self._rich.print(Text(text))
        else:
            print(text, file=self._stream, flush=True)

    def closing_table(self, summary: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
        """The run in numbers, and where everything is; ends the live line."""
        self.close()
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, value in _closing_rows(summary):
            table.add_row(Text(label), Text(value))
        table.add_row("", "")
        for label, path in paths.items():
            table.add_row(Text(label), Text(str(path)))
        self._rich.print()
        self._rich.print(table)
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last live line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def format_row(row: StepRow, eta_s: float | None) -> str:
    """``policy 12/30 · eta 3:10 · held-out 71.2% (base 18.3%) · …``."""
    parts = [f"{row.phase.value} {row.step}/{row.total}", f"eta {'–' if eta_s is None else format_duration(eta_s)}"]
    if row.heldout is not None:
        base = "" if row.heldout_base is None else f" (base {row.heldout_base:.1%})"
        parts.append(f"held-out {row.heldout:.1%}{base}")
    parts += [f"reward {row.reward:+.2f}", f"length {row.response_length:.0f}"]
    if row.explained_variance is not None and row.phase is Phase.value_pretraining:
        parts.append(f"explained variance {row.explained_variance:.2f}")
    parts += [
        f"age {row.age_mean:.1f} (max {row.age_max})",
        f"{row.tokens_per_s:,.0f} tok/s",
        f"waiting: generation {row.generation_wait:.0%}, learning {row.learning_wait:.0%}",
    ]
    return " · ".join(parts)


def format_duration(seconds: float) -> str:
    """``0:42``, ``3:10``, ``1:02:03``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _closing_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary in words; what it lacks, or does not know (None), is left out."""
    summary = {name: value for name, value in summary.items() if value is not None}
    rows = []
    if "base_accuracy" in summary and "final_accuracy" in summary:
        gain = 100 * (summary["final_accuracy"] - summary["base_accuracy"])
        text = f"{summary['base_accuracy']:.1%} → {summary['final_accuracy']:.1%} ({gain:+.1f} points"
        text += f", best {summary['best_accuracy']:.1%})" if "best_accuracy" in summary else ")"
        rows.append(("held-out accuracy", text))
    if "wall_s" in summary:
        rows.append(("time", format_duration(summary["wall_s"])))
    if "versions" in summary and "optimizer_steps" in summary:
        rows.append(("training", f"{summary['versions']:,} versions, {summary['optimizer_steps']:,} optimizer steps"))
    if "generated_tokens" in summary and "trained_tokens" in summary:
        rows.append(("tokens", f"{summary['generated_tokens']:,} generated, {summary['trained_tokens']:,} trained on"))
    if "mean_age" in summary and "max_age" in summary:
        bound = f" of at most {summary['max_staleness']}" if "max_staleness" in summary else ""
        rows.append(("age in versions", f"mean {summary['mean_age']:.2f}, max {summary['max_age']}{bound}"))
    if "tickets" in summary:
        rows.append(("tickets", _tickets(summary["tickets"], summary.get("refund_reasons", {}))))
    if lengths := _lengths(summary.get("lengths", {}), summary.get("length_bias")):
        rows.append(("mean response length", lengths))
    if restarts := summary.get("restarts"):
        rows.append(("processes replaced", ", ".join(f"{n} × {stage}" for stage, n in restarts.items())))
    if "seed" in summary:
        rows.append(("seed", str(summary["seed"])))
    return rows


def _tickets(ends: Mapping[str, int], reasons: Mapping[str, int]) -> str:
    """``9 charged, 6 committed, 2 refunded (1 all right, 1 straggler), 1 outstanding``."""
    told = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items() if n)
    return ", ".join(
        f"{n:,} {name}" + (f" ({told})" if name == "refunded" and told else "") for name, n in ends.items()
    )


def _lengths(lengths: Mapping[str, Mapping[str, Any]], bias: float | None) -> str:
    """``40.1 generated, 38.9 trained on (-1.2), 52.0 dropped``, in tokens; kinds without a response are left out."""
    parts = [
        f"{counts['mean']:,.1f} {'trained on' if kind == 'trained' else kind}"
        + (f" ({bias:+.1f})" if kind == "trained" and bias is not None else "")
        for kind, counts in lengths.items()
        if counts["responses"]
    ]
    return ", ".join(parts)
