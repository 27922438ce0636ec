"""The inline schedule: drawn from the seed, written down, repeated; wrong files and departures are one line."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import tiny_overrides
from running import FEW_PROBLEMS, assert_same_end

from vapo_async.config import BufferConfig, Config, ConfigError, InlineLauncherConfig, OnStraggler, RunError
from vapo_async.config.load import load_config
from vapo_async.launcher.preflight import preflight
from vapo_async.launcher.run import launch
from vapo_async.launcher.schedule import SCHEDULE_FILE, Schedule, Turn, read_schedule
from vapo_async.metrics.console import Console
from vapo_async.metrics.loggers import read_metrics
from vapo_async.metrics.names import AGE_MAX


@pytest.fixture
def tiny_config(base_folder: Path, tmp_path: Path) -> Config:
    return load_config([*tiny_overrides(base_folder, tmp_path), FEW_PROBLEMS, "evaluation.every=0"])


def run(config: Config, tmp_path: Path, name: str) -> Path:
    return launch(dataclasses.replace(config, runs_dir=str(tmp_path / name)), Console())[1]


def overlapping(config: Config, **more: object) -> Config:
    buffer = BufferConfig(max_staleness=4, lead=2)
    launcher = InlineLauncherConfig(overlap_steps=5)
    return dataclasses.replace(config, **{"buffer": buffer, "launcher": launcher, "steps": 4} | more)  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_schedule_and_its_replay_the_same_weights(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = overlapping(tiny_config)
    first, second = run(config, tmp_path, "first"), run(config, tmp_path, "second")
    assert_same_end(second, first)
    turns = read_schedule(first / SCHEDULE_FILE)
    assert [turn.version for turn in turns] == list(range(5))
    assert all(0 <= turn.overlap <= 10 for turn in turns) and len({turn.overlap for turn in turns}) > 2
    assert len({row[AGE_MAX] for row in read_metrics(first) if AGE_MAX in row}) > 1, "ages are spread"
    replayed = InlineLauncherConfig(overlap_steps=99, replay=str(first / SCHEDULE_FILE))
    third = run(overlapping(tiny_config, launcher=replayed), tmp_path, "third")
    assert_same_end(third, first)


def test_dropped_stragglers_are_dropped_again_by_the_replay(tiny_config: Config, tmp_path: Path) -> None:
    """Which ones is up to the clock: so short a limit that most decode steps reach it."""
    buffer = BufferConfig(max_staleness=2, lead=0, on_straggler=OnStraggler.drop, straggler_timeout_s=0.004)
    first = run(overlapping(tiny_config, buffer=buffer), tmp_path, "first")
    turns = read_schedule(first / SCHEDULE_FILE)
    drops = [drop for turn in turns for drop in turn.drops]
    assert len(drops) >= 3
    summary = json.loads((first / "summary.json").read_text())
    assert summary["tickets"]["refunded"] == summary["refund_reasons"]["straggler"] == len(drops)
    assert len({ticket for _, ticket in drops}) == len(drops)
    launcher = InlineLauncherConfig(replay=str(first / SCHEDULE_FILE))
    again = run(overlapping(tiny_config, buffer=buffer, launcher=launcher), tmp_path, "again")
    assert_same_end(again, first)


def test_a_run_that_departs_from_the_schedule_says_where(tiny_config: Config, tmp_path: Path) -> None:
    first = run(overlapping(tiny_config, steps=3), tmp_path, "first")
    rows = [json.loads(line) for line in (first / SCHEDULE_FILE).read_text().splitlines()]
    changed = tmp_path / "changed.jsonl"
    steps = rows[2]["steps"]
    for change, words in (
        ({"steps": steps + 1}, rf"at version 2: its batch took {steps} decode steps.*in the file {steps + 1}, 0"),
        ({"steps": steps - 1}, rf"at version 2: its batch took more than {steps - 1} decode steps"),
        ({"drops": [[1, 999]]}, "at version 2: the file drops ticket 999 after 1 decode steps"),
    ):
        changed.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:2], rows[2] | change, *rows[3:]]))
        launcher = InlineLauncherConfig(replay=str(changed))
        with pytest.raises(RunError, match=f"the run departs from launcher.replay {words}"):
            run(overlapping(tiny_config, launcher=launcher, steps=3), tmp_path, "again")


ROW = '{"version": 0, "steps": 5, "overlap": 0, "drops": []}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the schedule .*No such file"),
        ("", "has no row of version 0, the run needs 0 to 3"),
        (ROW, "has no row of version 1, the run needs 0 to 3"),
        (ROW + '{"version": 1, "st', "has no row of version 1"),
        ("seed: 0\n", "line 1: no row of a schedule"),
        ('{"version": 0}\n', "line 1: no row of a schedule"),
        ('{"version": 0, "steps": -5, "overlap": 0, "drops": []}\n', "line 1: no row of a schedule"),
        ("[1]\n" + ROW, "line 1: no row of a schedule"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_starts(
    tiny_config: Config, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "schedule.jsonl"
    if content is not None:
        path.write_text(content)
    config = dataclasses.replace(tiny_config, launcher=InlineLauncherConfig(replay=str(path)))
    with pytest.raises(ConfigError, match=words) as caught:
        preflight(config)
    assert "\n" not in str(caught.value)


def test_steps_are_uniform_between_none_and_twice_as_many() -> None:
    schedule = Schedule(3, seed=1)
    counts = [0] * 7
    for version in range(7000):
        counts[schedule.taken()] += 1
        schedule.published(version + 1)
    assert all(abs(count - 1000) < 150 for count in counts), "five standard deviations of a binomial"


def test_a_resumed_schedule_goes_on_in_the_middle_of_a_turn_and_rewrites_its_rows(tmp_path: Path) -> None:
    path = tmp_path / SCHEDULE_FILE

    def turns(schedule: Schedule, first: int, last: int) -> None:
        for version in range(first, last):
            while schedule.turn.steps < 4:
                schedule.stepped()
            schedule.overlapped(schedule.taken())
            schedule.published(version + 1)

    schedule = Schedule(3, seed=1)
    schedule.record(path)
    turns(schedule, 0, 2)
    schedule.stepped()
    schedule.dropped(17)
    saved = json.loads(json.dumps(schedule.state_dict()))
    turns(schedule, 2, 5)
    expected = path.read_text()
    assert read_schedule(path)[2].drops == [(1, 17)]
    with path.open("a") as file:
        file.write('{"version": 5, "st')  # cut by a kill
    resumed = Schedule(3, seed=2)
    resumed.record(path)
    resumed.load_state_dict(saved)
    assert [turn.version for turn in read_schedule(path)] == [0, 1]
    assert resumed.turn == Turn(2, steps=1, drops=[(1, 17)])
    turns(resumed, 2, 5)
    assert path.read_text() == expected


def test_a_torn_schedule_of_its_own_does_not_stop_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / SCHEDULE_FILE
    path.write_text('{"version": 0, "st')
    schedule = Schedule(0, 0)
    schedule.record(path)
    schedule.start(1)
    schedule.published(2)
    assert read_schedule(path) == [Turn(1)]
