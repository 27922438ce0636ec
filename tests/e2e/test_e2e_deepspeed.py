"""Runs whose learner is DeepSpeed over two ranks, as a user starts them."""

import json
import re
from pathlib import Path

import psutil
import pytest
from running import command, newest_run, start, wait_for
from safetensors import safe_open
from test_e2e_learning import train
from test_e2e_ray_faults import assert_balanced, of_stage, summary_of

from vapo_async.checkpoint import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(600)]

TWO = ("launcher=ray", "learner=deepspeed", "learner.ranks=2", "evaluation.every=0")


def test_a_run_with_vllm_and_all_parameters_in_parts_is_right_after_every_update(
    base_folder: Path, tmp_path: Path
) -> None:
    """Engine and learner are compared with every batch."""
    log = tmp_path / "log"
    more = (
        *TWO,
        "learner.zero_stage=3",
        "engine=vllm",
        "steps=20",
        "task.max_response_tokens=40",
        "algorithm.policy_lr=1e-3",
    )
    process = start(command(base_folder, tmp_path, *more, "engine.max_mismatch=1e-3"), log)
    assert process.wait(timeout=500) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
    run_dir = newest_run(tmp_path)
    summary = summary_of(run_dir)
    assert_balanced(summary)
    assert summary["status"] == "finished" and summary["versions"] == 21
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row.get("engine_mismatch_tokens", 0) > 0]
    assert len(measured) > 15 and max(row["engine_mismatch_max"] for row in measured) < 1e-3
    policy = list_checkpoints(run_dir)[-1] / "policy"
    assert sorted(path.name for path in policy.glob("*.safetensors")) == [
        f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)
    ]


def test_a_dead_rank_ends_the_run_which_goes_on_with_one_rank(base_folder: Path, tmp_path: Path) -> None:
    log, again = tmp_path / "log", tmp_path / "again"
    process = start(command(base_folder, tmp_path, *TWO, "checkpoint.every=3", "steps=100000"), log)
    wait_for(log, "policy 5/", process, timeout_s=200)
    ranks = of_stage(process, "LearnerActor")
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(timeout=60) == 1, log.read_text()
    assert re.search(r"^error: .*learner.*died", log.read_text(), re.MULTILINE), log.read_text()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive, "the other rank does not wait for what will not come"
    more = (*TWO, "learner.ranks=1", "learner.zero_stage=1", "steps=20", "resume=auto")
    process = start(command(base_folder, tmp_path, *more), again)
    assert process.wait(timeout=300) == 0, again.read_text()
    run_dir = newest_run(tmp_path)
    assert summary_of(run_dir)["status"] == "finished"
    with safe_open(list_checkpoints(run_dir)[-1] / "policy" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_job_passes_its_bar_over_two_ranks(tmp_path: Path) -> None:
    summary = train(tmp_path, "learner=deepspeed", "learner.ranks=2", timeout_s=3500)
    assert summary["final_accuracy"] >= 0.75
    assert summary["final_accuracy"] - summary["base_accuracy"] >= 0.35
