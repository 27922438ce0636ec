"""A section of the benchmark in a process of its own, with a time limit.

It reports a line for every number as soon as that is there, so that a section that fails later has told something.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import torch

T = TypeVar("T")
DONE, FAILED, SKIPPED = "done", "FAILED", "skipped"
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Nothing here needs a network; without this, libraries would wait for one."""
LOG_LINES: Final = 20
"""Of what a failed section wrote are shown."""


@dataclass(frozen=True)
class Task:
    """What a section is told."""

    quick: bool
    device: str
    """``cuda`` or ``cpu``."""
    scratch: Path
    """A folder that all sections share, and nobody else."""


@dataclass(frozen=True)
class Line:
    """A line of the table, and the same in full for the JSON file."""

    what: str
    took: str
    told: str
    row: dict[str, Any]


Report = Callable[[Line], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a section."""

    name: str
    status: str
    """``done``, ``FAILED`` or ``skipped``."""
    seconds: float = 0.0
    reason: str | None = None
    """Of failing or being skipped."""
    lines: list[Line] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Without what is only for the table."""
        rows = [line.row for line in self.lines]
        return {"section": self.name, "status": self.status, "seconds": self.seconds, "reason": self.reason} | {
            "rows": rows
        }


def reporter(name: str, path: Path) -> Report:
    """In the section's process: prints each line, and adds it to the file."""

    def report(line: Line) -> None:
        print(f"  {name}: {line.what}: {' · '.join(filter(None, (line.took, line.told)))}", flush=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    return report


def reported(path: Path) -> list[Line]:
    """All lines of the file but one that was cut."""
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    return [Line(**json.loads(text)) for text in written.splitlines(keepends=True) if text.endswith("\n")]


def run_section(name: str, command: Sequence[str], limit_s: float, lines: Path) -> Outcome:
    """Args:
    name: of the section.
    command: its process, which reports to ``lines``.
    limit_s: seconds, after which it is killed with all that it has started.
    lines: a file that does not exist yet.
    """
    log = lines.with_suffix(".log")
    start = time.perf_counter()
    reason = _run(command, limit_s, log)
    seconds = time.perf_counter() - start
    if reason is not None:
        for text in log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]:
            print(f"  {name} | {text}")
    return Outcome(name, DONE if reason is None else FAILED, seconds, reason, reported(lines))


def _run(command: Sequence[str], limit_s: float, log: Path) -> str | None:
    """Why it failed; what it writes to standard error goes to ``log``."""
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env=os.environ | OFFLINE, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"stopped: it took longer than {limit_s:g} s"
        finally:  # an engine's processes too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return None
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    written = [text.strip() for text in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((text for text in reversed(written) if text), f"exit code {code}")


def synchronize(device: str) -> None:
    """Waits for what was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], T], device: str, repeats: int, calls: int = 1) -> tuple[float, T]:
    """Median seconds of ``call``, and what the first one returned, which does not count.

    Args:
        call: what is timed.
        device: that it runs on.
        repeats: how many numbers the median is of.
        calls: one after another for each number, where one alone is too short to be timed.
    """
    first = call()
    found = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        found.append((time.perf_counter() - start) / calls)
    return median(found), first
