"""Two engines of vLLM that get their weights from the learner by broadcast; one of them is killed."""

import json
from pathlib import Path

import pytest
from running import command, newest_run, start, wait_for
from test_e2e_vllm import NOTICED_S, VLLM, S, assert_nothing_left, assert_sound, family_of, named, rows_of

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

BROADCAST = ("engine.weight_transport=broadcast", "launcher.rollout_workers=2", "engine.max_mismatch=1e-3")


def test_a_group_is_made_anew_when_one_of_its_engines_was_killed(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(base_folder, tmp_path, *VLLM, *BROADCAST, "steps=60", "evaluation.every=0"), log)
    wait_for(log, "policy 5/", process, timeout_s=300)
    family = family_of(process)
    actor = named(family, "ray::RolloutActor")[0]
    (engine,) = named(actor.children(), "VLLM::EngineCore")
    engine.kill()
    wait_for(log, "is replaced", process, timeout_s=NOTICED_S + 5)
    assert process.wait(timeout=400) == 0, log.read_text()
    assert_nothing_left(family)
    run_dir = newest_run(tmp_path)
    summary = assert_sound(run_dir)
    assert summary["status"] == "finished" and summary["max_staleness"] == S
    assert sum(n for who, n in summary["restarts"].items() if who.startswith("rollout worker")) in (1, 2)
    measured = [row["engine_mismatch_max"] for row in rows_of(run_dir) if "engine_mismatch_max" in row]
    assert len(measured) > 30 and max(measured) < 1e-3, json.dumps(measured)
