"""Real Ray: every stage in its own process, overlap, staleness, Ctrl-C and resume."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from running import command, newest_run, start, wait_for

from vapo_async.state import read_state

pytestmark = pytest.mark.ray

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
RAY = ("launcher=ray", "buffer.max_staleness=2")


def test_a_run_over_ray_keeps_the_bound_and_balances(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(base_folder, tmp_path, *RAY, "steps=12", "launcher.rollout_workers=2"), log)
    wait_for(log, "run folder", process)
    for child in psutil.Process(process.pid).children(recursive=True):
        for connection in child.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in LOOPBACK, f"{child.name()} listens on {connection.laddr}"
    assert process.wait(timeout=200) == 0, log.read_text()
    run_dir = newest_run(tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["versions"] == 13
    assert summary["optimizer_steps"] == 24
    assert 0 < summary["mean_age"] <= summary["max_age"] <= summary["max_staleness"] == 2
    assert sum(summary["age_histogram"].values()) == 26
    tickets = summary["tickets"]
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    assert tickets["committed"] >= 26
    assert summary["generated_tokens"] >= summary["trained_tokens"] > 0
    assert {path.name for path in run_dir.iterdir()} >= {"config.yaml", "metrics.jsonl", "report.png", "checkpoints"}
    assert str(run_dir / "report.png") in log.read_text()


def test_ctrl_c_keeps_what_is_in_flight_and_resume_goes_on_with_it(base_folder: Path, tmp_path: Path) -> None:
    # Generation is what takes time: something is in flight whenever the signal comes.
    more = (*RAY, "task.max_response_tokens=150", "engine.max_slots=12", "evaluation.every=0")
    log = tmp_path / "log"
    process = start(command(base_folder, tmp_path, *more, "steps=100000"), log)
    wait_for(log, "policy 2/", process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends: to every process of the group
    assert process.wait(timeout=100) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    run_dir = newest_run(tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["versions"] >= 3
    state = read_state(sorted((run_dir / "checkpoints").iterdir())[-1], "flow")
    in_flight = {int(ticket_id) for ticket_id in state.data["prompts"]}
    assert in_flight
    assert sum(value.numel() for key, value in state.tensors.items() if key.startswith("carried/")) > 0
    steps = summary["versions"] + 2  # one batch is pretraining: three more policy updates
    again = tmp_path / "again"
    process = start(command(base_folder, tmp_path, *more, f"steps={steps}", "resume=auto"), again)
    assert process.wait(timeout=200) == 0, again.read_text()
    assert newest_run(tmp_path) == run_dir
    resumed = json.loads((run_dir / "summary.json").read_text())
    assert resumed["versions"] == steps + 1
    assert resumed["base_accuracy"] == summary["base_accuracy"]
    assert resumed["max_age"] <= 2
    tickets = resumed["tickets"]
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == list(range(steps + 1))
    ledger = [json.loads(line) for line in (run_dir / "flow.jsonl").read_text().splitlines()]
    trained = [ticket for row in ledger for ticket in row["tickets"]]
    assert len(trained) == len(set(trained))
    assert in_flight <= set(trained), "under their own ids: nothing was given back"
    assert "worker lost" not in resumed["refund_reasons"]
