"""How generation and learning interleave in an inline run: drawn from a seed, written down, repeated from a file.

A turn is what happens between two publications. With its config and seed it decides a whole inline run but for one
thing: which stragglers are dropped is up to the wall clock. So each turn is a row of ``schedule.jsonl``, and a run that
is given the file repeats it.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vapo_async.config import ConfigError, RunError
from vapo_async.metrics.jsonl import JsonLines, read_json_lines

SCHEDULE_FILE = "schedule.jsonl"
"""In a run's folder: one row for each version."""
_SAME = "replay with the configuration and the code of the run that wrote it"


@dataclass
class Turn:
    """From one publication to the next. Steps are decode steps of the engine."""

    version: int
    """That of the weights that the batch was learned with."""
    steps: int = 0
    """Until the batch was taken."""
    overlap: int = 0
    """While it was learned, with the weights of before."""
    drops: list[tuple[int, int]] = field(default_factory=list)
    """(steps done when it was dropped, ticket id) of each straggler."""


def read_schedule(path: Path) -> list[Turn]:
    """Rows by version; of two rows of one version the later one counts. A last row that a kill cut is left out.

    Raises:
        ConfigError: the file cannot be read or is no schedule.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"cannot read the schedule {path}: {reason}; give a run's {SCHEDULE_FILE}") from error
    turns: dict[int, Turn] = {}
    for number, line in enumerate(lines, 1):
        try:
            turn = _turn(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and turns:
                break
            raise ConfigError(f"{path}, line {number}: no row of a schedule; give a run's {SCHEDULE_FILE}") from error
        turns[turn.version] = turn
    return [turns[version] for version in sorted(turns)]


def replayed(path: Path, versions: int) -> list[Turn]:
    """The turns 0 … ``versions`` − 1 of the schedule that ``launcher.replay`` names.

    Raises:
        ConfigError: it is no schedule or lacks one of them.
    """
    found = {turn.version: turn for turn in read_schedule(path)}
    missing = next((version for version in range(versions) if version not in found), None)
    if missing is not None:
        raise ConfigError(
            f"launcher.replay={path} has no row of version {missing}, the run needs 0 to {versions - 1}: "
            "give the schedule of a run that is as long, or lower steps"
        )
    return [found[version] for version in range(versions)]


class Schedule:
    """Decides the turns of one run and keeps them.

    Args:
        overlap_steps: mean number of decode steps while a batch is learned.
        seed: draws each turn's number.
        replay: turns to repeat, by version; None for a run with a schedule of its own.
    """

    def __init__(self, overlap_steps: int, seed: int, replay: Iterable[Turn] | None = None) -> None:
        self._overlap_steps = overlap_steps
        self._random = random.Random(seed)
        self._replay = None if replay is None else {turn.version: turn for turn in replay}
        self._path: Path | None = None
        self._file: JsonLines | None = None
        self.turn = Turn(0)
        """The one that runs now."""

    @property
    def replays(self) -> bool:
        """Whether the turns come from a file."""
        return self._replay is not None

    def record(self, path: Path) -> None:
        """Writes each turn there when it ends."""
        self._path = path

    def start(self, version: int) -> None:
        """Goes on at this version. Rows that a resumed run writes again are taken out."""
        self.turn = Turn(version)
        self._cut()

    def drop_now(self) -> int | None:
        """The ticket that the replayed turn drops before the next decode step; None if there is none."""
        drops = self._expected().drops if self.replays else []
        done = len(self.turn.drops)
        if done < len(drops) and drops[done][0] == self.turn.steps:
            return drops[done][1]
        return None

    def not_running(self, ticket_id: int) -> RunError:
        """The error for a ticket that is to be dropped and does not run."""
        return RunError(
            f"the run departs from launcher.replay at version {self.turn.version}: the file drops ticket {ticket_id} "
            f"after {self.turn.steps} decode steps, and it does not run; {_SAME}"
        )

    def dropped(self, ticket_id: int) -> None:
        """A straggler was cancelled."""
        self.turn.drops.append((self.turn.steps, ticket_id))

    def stepped(self) -> None:
        """A decode step was made for the batch that the learner waits for.

        Raises:
            RunError: the replayed turn had its batch before it.
        """
        self.turn.steps += 1
        if self.replays and self.turn.steps > self._expected().steps:
            raise self._departed(f"more than {self._expected().steps}")

    def taken(self) -> int:
        """The batch is there. Returns how many decode steps to make while it is learned.

        Raises:
            RunError: the replayed turn had its batch later, or drops that this one did not come to.
        """
        if not self.replays:
            return self._random.randint(0, 2 * self._overlap_steps)
        expected = self._expected()
        if (self.turn.steps, self.turn.drops) != (expected.steps, expected.drops):
            raise self._departed(str(self.turn.steps))
        return expected.overlap

    def overlapped(self, steps: int) -> None:
        """``steps`` were made: fewer than asked for where there was nothing to generate.

        Raises:
            RunError: the replayed turn made more.
        """
        self.turn.overlap = steps
        if self.replays and steps != self._expected().overlap:
            raise self._departed(str(self.turn.steps))

    def published(self, version: int) -> None:
        """The turn ended with this version: its row is written."""
        if self._path is not None:
            if self._file is None:
                self._file = JsonLines(self._path)
            self._file.write(asdict(self.turn))
        self.turn = Turn(version)

    def state_dict(self) -> dict[str, Any]:
        """JSON data: the random state, and the turn as far as it got."""
        kind, numbers, gauss = self._random.getstate()
        return {"random": [kind, list(numbers), gauss], "turn": asdict(self.turn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on in the middle of a turn. Rows that a resumed run writes again are taken out."""
        kind, numbers, gauss = state["random"]
        self._random.setstate((kind, tuple(numbers), gauss))
        self.turn = _turn(state["turn"])
        self._cut()

    def _cut(self) -> None:
        if self._path is None or not self._path.exists():
            return
        kept = {row["version"]: row for row in read_json_lines(self._path) if row["version"] < self.turn.version}
        draft = self._path.with_name(f".{self._path.name}.partial")
        draft.write_text("".join(json.dumps(kept[version]) + "\n" for version in sorted(kept)), encoding="utf-8")
        draft.replace(self._path)

    def _expected(self) -> Turn:
        assert self._replay is not None
        return self._replay[self.turn.version]

    def _departed(self, steps: str) -> RunError:
        expected, found = self._expected(), self.turn
        return RunError(
            f"the run departs from launcher.replay at version {found.version}: its batch took {steps} decode steps, "
            f"{len(found.drops)} drops and {found.overlap} steps of overlap, in the file {expected.steps}, "
            f"{len(expected.drops)} and {expected.overlap}; {_SAME}"
        )


def _turn(row: dict[str, Any]) -> Turn:
    drops = [(int(step), int(ticket)) for step, ticket in row["drops"]]
    turn = Turn(int(row["version"]), int(row["steps"]), int(row["overlap"]), drops)
    if min(turn.version, turn.steps, turn.overlap) < 0:
        raise ValueError("negative")
    return turn
