"""Real Ray runs, as a user starts them, whose processes are killed: the run goes on, or ends in one line."""

import json
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from running import command, newest_run, start, wait_for

from vapo_async.checkpoint import list_checkpoints
from vapo_async.metrics.ledger import read_flow

pytestmark = pytest.mark.ray

S = 2
RAY = ("launcher=ray", f"buffer.max_staleness={S}", "evaluation.every=0")


def of_stage(process: subprocess.Popen[str], stage: str) -> list[psutil.Process]:
    """The processes of one stage's actors."""
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    return [child for child in family if f"ray::{stage}" in " ".join(child.cmdline())]


def summary_of(run_dir: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((run_dir / "summary.json").read_text())
    return summary


def assert_balanced(summary: dict[str, object]) -> None:
    tickets = summary["tickets"]
    assert isinstance(tickets, dict)
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]


def trained_tickets(run_dir: Path) -> list[int]:
    return [ticket for row in read_flow(run_dir) for ticket in row["tickets"]]


def newest_step(run_dir: Path) -> int:
    """Batches that the newest checkpoint holds."""
    return int(list_checkpoints(run_dir)[-1].name.removeprefix("step_").removesuffix(".replaced"))


def test_worker_and_verifier_are_replaced_and_a_dead_learner_ends_the_run_which_resumes(
    base_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    more = (*RAY, "task.max_response_tokens=100")  # generation is what takes time: there is something to lose
    process = start(command(base_folder, tmp_path, *more, "steps=100000", "checkpoint.every=5"), log)
    wait_for(log, "policy 2/", process)
    (worker,) = of_stage(process, "RolloutActor")
    worker.kill()
    wait_for(log, "rollout worker 0 is replaced", process)
    (verifier,) = of_stage(process, "VerifierActor")
    verifier.kill()
    wait_for(log, "the verifier is started again", process)
    run_dir = newest_run(tmp_path)
    wait_for(run_dir / "flow.jsonl", '"verifier": 1', process)
    told = len((run_dir / "flow.jsonl").read_text().splitlines())
    while newest_step(run_dir) < told:  # a checkpoint that knows of both
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    (learner,) = of_stage(process, "LearnerActor")
    family = psutil.Process(process.pid).children(recursive=True)
    learner.kill()
    assert process.wait(timeout=60) == 1, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ") and "learner" in last and "died" in last, last
    assert f"resume=auto goes on from {run_dir}" in log.read_text()
    assert not re.search(r"Traceback|ray::|File \"", log.read_text()), log.read_text()
    assert any((run_dir / "logs").iterdir())
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive

    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    steps = json.loads((newest / "run.json").read_text())["totals"]["versions"] + 3
    again = tmp_path / "again"
    process = start(command(base_folder, tmp_path, *more, f"steps={steps}", "resume=auto"), again)
    assert process.wait(timeout=200) == 0, again.read_text()
    summary = summary_of(run_dir)
    assert summary["status"] == "finished"
    assert summary["versions"] == steps + 1
    assert summary["restarts"] == {"rollout worker 0": 1, "verifier": 1}
    assert isinstance(reasons := summary["refund_reasons"], dict)
    assert reasons["worker lost"] >= 1
    assert_balanced(summary)
    assert isinstance(oldest := summary["max_age"], int) and oldest <= S
    trained = trained_tickets(run_dir)
    assert len(trained) == len(set(trained)) == 2 * (steps + 1)


@pytest.mark.slow
def test_without_replacements_a_killed_worker_ends_the_run_with_one_line(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    more = (*RAY, "steps=100000", "launcher.max_restarts=0")
    process = start(command(base_folder, tmp_path, *more), log)
    wait_for(log, "policy 1/", process)
    (worker,) = of_stage(process, "RolloutActor")
    worker.kill()
    start_s = time.monotonic()
    assert process.wait(timeout=60) == 1, log.read_text()
    assert time.monotonic() - start_s < 30
    last = log.read_text().strip().splitlines()[-1]
    assert last == (
        "error: rollout worker 0 died once, the last time because its process died, and launcher.max_restarts=0 "
        "allows no further replacement; see logs/ in the run folder"
    )
    run_dir = newest_run(tmp_path)
    assert f"resume=auto goes on from {run_dir}" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_stragglers_are_dropped_and_the_run_finishes(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    drop = ("buffer.on_straggler=drop", "buffer.straggler_timeout_s=0.05", "buffer.max_drops=1")
    # Without staleness nothing can take the place of a batch's group, so that somebody is always waited for.
    more = (*RAY, *drop, "buffer.max_staleness=0", "task.max_response_tokens=150", "steps=6")
    assert start(command(base_folder, tmp_path, *more), log).wait(timeout=200) == 0, log.read_text()
    summary = summary_of(newest_run(tmp_path))
    assert isinstance(reasons := summary["refund_reasons"], dict)
    assert reasons["straggler"] >= 1
    assert isinstance(lengths := summary["lengths"], dict)
    assert lengths["dropped"]["responses"] >= 4
    assert_balanced(summary)
    assert summary["restarts"] == {}


def test_a_start_that_takes_too_long_is_one_line(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert start(command(base_folder, tmp_path, *RAY, "launcher.start_timeout_s=0.5"), log).wait(timeout=60) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: the run waited 0.5 s for these to start and gave up: "), last
    assert "rollout worker 0" in last
    assert "launcher.start_timeout_s" in last
    assert "Traceback" not in log.read_text()
