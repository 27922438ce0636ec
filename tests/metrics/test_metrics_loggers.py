"""Loggers write what they were given, append on resume, and say what to install."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from vapo_async.config import ConfigError, LoggingConfig
from vapo_async.metrics.jsonl import JsonLines
from vapo_async.metrics.loggers import METRICS_FILE, build_logger, check_loggers, read_metrics


def test_metrics_rows_are_written_and_merged_by_step(tmp_path: Path) -> None:
    with build_logger(LoggingConfig(), tmp_path, "run", value_pretraining_steps=2) as log:
        log.log(0, {"heldout_accuracy": 0.25})
        log.log(-1, {"reward": -1.0})
        log.log(0, {"reward": -0.5})
        log.log(1, {"reward": 0.5, "entropy": 2})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, -1, 0, 1]
    assert read_metrics(tmp_path) == [
        {"step": -1, "reward": -1.0},
        {"step": 0, "heldout_accuracy": 0.25, "reward": -0.5},
        {"step": 1, "reward": 0.5, "entropy": 2.0},
    ]
    assert (tmp_path / "csv" / "scalars" / "reward.csv").read_text() == "1,-1.0\n2,-0.5\n3,0.5\n"


def test_metrics_resumed_run_appends_and_the_later_row_wins(tmp_path: Path) -> None:
    for reward in (0.1, 0.9):
        with build_logger(LoggingConfig(), tmp_path, "run") as log:
            log.log(1, {"reward": reward})
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 0.9}]
    assert (tmp_path / "csv" / "scalars" / "reward.csv").read_text() == "1,0.1\n1,0.9\n"


def test_metrics_row_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 0.5}]
    with build_logger(LoggingConfig(), tmp_path, "run") as log:
        log.log(2, {"reward": 0.7})
    assert read_metrics(tmp_path) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.7}]


def test_metrics_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with build_logger(LoggingConfig(), tmp_path, "run") as log:
        log.log(1, {"explained_variance": math.nan, "loss": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "explained_variance": None, "loss": None}
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_metrics_full_disk_fails_the_write_and_not_the_close() -> None:
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        lines.write({"step": 1})
    lines.close()


def test_metrics_reading_a_folder_without_any_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is it a run's folder"):
        read_metrics(tmp_path)


def test_metrics_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with build_logger(LoggingConfig(tensorboard=True), tmp_path, "run", value_pretraining_steps=5) as log:
        log.log(-4, {"reward": 0.25})
        log.log(3, {"reward": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.25), (8, 0.75)]


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_metrics_missing_logger_says_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'vapo-async\[{package}\]'"):
        check_loggers(LoggingConfig(**{package: True}))
    with pytest.raises(ConfigError):
        build_logger(LoggingConfig(**{package: True}), tmp_path / "run", "run")
    assert not (tmp_path / "run").exists()


def test_metrics_plain_logging_asks_for_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_loggers(LoggingConfig())


def test_metrics_leave_out_the_policy_steps_that_a_resume_undid(tmp_path: Path) -> None:
    rows = [{"step": 0, "heldout_accuracy": 0.2}]
    rows += [{"step": step, "version": step + 2, "reward": float(step)} for step in (-1, 0, 1, 2, 3)]
    rows += [{"step": 3, "heldout_accuracy": 0.9}, {"step": 1, "version": 3, "reward": 10.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    merged = read_metrics(tmp_path)
    assert [(row["step"], row["reward"]) for row in merged] == [(-1, -1.0), (0, 0.0), (1, 10.0)]
    assert merged[1]["heldout_accuracy"] == 0.2 and "heldout_accuracy" not in merged[2]
