"""Real runs over Ray whose engines are vLLM's: they end as others do, engines that are killed or hang are replaced, and
none is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, tiny_overrides
from running import FEW_PROBLEMS, command, newest_run, start, wait_for
from safetensors.torch import load_file

from vapo_async.metrics.ledger import read_flow
from vapo_async.state import read_state

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]

S = 2
VLLM = (
    "launcher=ray",
    "engine=vllm",
    f"buffer.max_staleness={S}",
    "task.max_response_tokens=60",  # generation is what takes time: there is something to lose
    "algorithm.policy_lr=1e-3",  # weights that are soon far from the base's
)
ENDLESS = "steps=100000"
NOTICED_S = 10


def named(family: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Those that live and have ``name`` in their command line."""
    found = []
    for process in family:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def family_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def engine_of(process: subprocess.Popen[str], stage: str) -> psutil.Process:
    """vLLM's process below that of a stage."""
    deadline = time.monotonic() + 30
    while True:
        actors = named(family_of(process), f"ray::{stage}")  # none for a moment, while Ray writes a new title
        engines = [engine for actor in actors for engine in named(actor.children(), "VLLM::EngineCore")]
        if engines:
            assert len(engines) == 1
            return engines[0]
        assert process.poll() is None and time.monotonic() < deadline, [child.cmdline() for child in family_of(process)]
        time.sleep(0.2)


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    before = set(psutil.Process().children())
    yield
    for process in set(psutil.Process().children()) - before:
        process.kill()  # Ray's processes end with it


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def trained_tickets(run_dir: Path) -> list[int]:
    return [ticket for row in read_flow(run_dir) for ticket in row["tickets"]]


def assert_sound(run_dir: Path) -> dict[str, Any]:
    """What holds for every run; its summary."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    tickets = summary["tickets"]
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    assert 0 < summary["max_age"] <= summary["max_staleness"] == S
    trained = trained_tickets(run_dir)
    assert len(trained) == len(set(trained)) == 2 * summary["versions"]
    assert tickets["committed"] >= len(trained)
    assert summary["generated_tokens"] >= summary["trained_tokens"] > 0
    return summary


def assert_nothing_left(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive


@pytest.fixture(scope="module")
def killed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, float]]:
    """A finished run in whose middle both engines were killed: its folder, its output, seconds until it noticed."""
    tmp_path = tmp_path_factory.mktemp("killed")
    log = tmp_path / "log"
    process = start(command(base_folder, tmp_path, *VLLM, "steps=40", "evaluation.every=10"), log)
    wait_for(log, "policy 3/", process, timeout_s=300)
    wait_for(newest_run(tmp_path) / "metrics.jsonl", "heldout_accuracy", process)
    family = family_of(process)
    engine, evaluators = engine_of(process, "RolloutActor"), engine_of(process, "EvaluatorActor")
    for one in (engine, evaluators):
        assert one.cpu_affinity() == psutil.Process().cpu_affinity(), "bound to cores, two would share one"
        assert one.environ()["OMP_NUM_THREADS"] == "1"
    engine.kill()
    killed_at = time.monotonic()
    evaluators.kill()
    wait_for(log, "is replaced", process)
    noticed_s = time.monotonic() - killed_at
    assert process.wait(timeout=300) == 0, log.read_text()
    assert_nothing_left(family)
    yield newest_run(tmp_path), log.read_text(), noticed_s


def test_a_killed_engine_is_replaced_within_seconds_and_the_run_finishes(killed: tuple[Path, str, float]) -> None:
    run_dir, log, noticed_s = killed
    assert noticed_s < NOTICED_S
    assert "rollout worker 0 is replaced (1 of 3 replacements): vLLM's engine process died\n" in log
    assert not re.search(r"Traceback|ray::|File \"|vllm\.", log), log
    summary = assert_sound(run_dir)
    assert summary["status"] == "finished"
    assert (summary["versions"], summary["optimizer_steps"]) == (41, 80)
    assert summary["restarts"] == {"rollout worker 0": 1, "evaluator": 1}
    assert summary["refund_reasons"].keys() == {"worker lost"}
    assert 1 <= summary["refund_reasons"]["worker lost"] <= 3


def test_the_new_engine_has_the_newest_weights(killed: tuple[Path, str, float], base_folder: Path) -> None:
    run_dir, _, _ = killed
    base = load_file(base_folder / "model.safetensors")
    last = load_file(sorted((run_dir / "checkpoints").iterdir())[-1] / "policy" / "model.safetensors")
    assert max(float((last[name] - base[name]).abs().max()) for name in base) > 0.01, "the base's would show"
    measured = [row for row in rows_of(run_dir) if row.get("engine_mismatch_tokens", 0) > 0]
    assert measured[-1]["step"] > 30 and measured[-1]["restarts"] == 2
    assert len([row for row in measured if row["restarts"] > 0]) > 20
    assert max(row["engine_mismatch_max"] for row in measured) < 1e-3


def test_no_evaluation_is_lost_with_the_evaluators_engine(killed: tuple[Path, str, float]) -> None:
    run_dir, log, _ = killed
    steps = [row["step"] for row in rows_of(run_dir) if "heldout_accuracy" in row]
    assert steps == sorted(steps) and {0, 10, 40} <= set(steps), "others are left out while one is on its way"
    assert "an evaluation failed" not in log
    assert "the evaluator is started again (1 of 3 times): its process died" in log


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "scripts" / "evaluate.py"
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_run_can_be_evaluated(killed: tuple[Path, str, float], tmp_path: Path) -> None:
    run_dir, _, _ = killed
    done = evaluate(str(run_dir), "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    assert (out["problems"], out["samples"]) == (4, 2)
    assert "Error" not in done.stdout + done.stderr, done.stderr


@pytest.mark.slow
def test_a_model_folder_can_be_evaluated_and_greedy_decoding_is_the_embedded_engines(
    base_folder: Path, tmp_path: Path
) -> None:
    settings = [o for o in tiny_overrides(base_folder, tmp_path) if not o.startswith(("model", "launcher"))]
    found = {}
    for engine in ("vllm", "transformers"):
        out = tmp_path / engine
        done = evaluate(str(base_folder), *settings, FEW_PROBLEMS, f"engine={engine}", "--json", str(out))
        assert done.returncode == 0, done.stderr
        found[engine] = json.loads(out.read_text())
    assert found["vllm"]["greedy_accuracy"] == found["transformers"]["greedy_accuracy"]
    assert found["vllm"]["problems"] == found["transformers"]["problems"] == 4


@pytest.mark.slow
def test_a_hung_engine_is_ended_and_replaced_and_a_dead_learner_leaves_no_engine(
    base_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    limits = ("launcher.engine_timeout_s=10", "evaluation.every=0")
    process = start(command(base_folder, tmp_path, *VLLM, *limits, ENDLESS), log)
    wait_for(log, "policy 2/", process, timeout_s=300)
    engine = engine_of(process, "RolloutActor")
    engine.suspend()
    stopped_at = time.monotonic()
    wait_for(log, "rollout worker 0 is replaced (1 of 3 replacements)", process)
    assert 8 < time.monotonic() - stopped_at < 10 + NOTICED_S
    engine.wait(timeout=10)  # a stopped process too ends with the one that started it
    told = len(trained_tickets(newest_run(tmp_path)))
    while len(trained_tickets(newest_run(tmp_path))) < told + 20:  # the new engine serves
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    family = family_of(process)
    assert len(named(family, "VLLM::EngineCore")) == 2
    (learner,) = named(family, "ray::LearnerActor")
    learner.kill()
    assert process.wait(timeout=60) == 1, log.read_text()
    assert "resume=auto goes on from" in log.read_text()
    assert_nothing_left(family)


@pytest.mark.slow
def test_ctrl_c_keeps_what_vllm_has_in_flight_and_a_resumed_run_goes_on_with_it(
    base_folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    more = (*VLLM, "evaluation.every=0")
    process = start(command(base_folder, tmp_path, *more, ENDLESS), log)
    wait_for(log, "policy 2/", process, timeout_s=300)
    family = family_of(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130, log.read_text()
    assert_nothing_left(family)
    assert not re.search(r"Traceback|is replaced|has no unfinished", log.read_text()), log.read_text()
    run_dir = newest_run(tmp_path)
    summary = assert_sound(run_dir)
    state = read_state(sorted((run_dir / "checkpoints").iterdir())[-1], "flow")
    in_flight = {int(ticket_id) for ticket_id in state.data["prompts"]}
    assert in_flight
    assert sum(value.numel() for key, value in state.tensors.items() if key.startswith("carried/")) > 0
    again = tmp_path / "again"
    steps = summary["versions"] + 4
    process = start(command(base_folder, tmp_path, *more, f"steps={steps}", "resume=auto"), again)
    assert process.wait(timeout=300) == 0, again.read_text()
    assert newest_run(tmp_path) == run_dir
    assert assert_sound(run_dir)["status"] == "finished"
    assert in_flight <= set(trained_tickets(run_dir)), "under their own ids: nothing was given back"
    assert max(row["engine_mismatch_max"] for row in rows_of(run_dir) if "engine_mismatch_max" in row) < 1e-3


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_one_line(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    too_long = ("task.max_response_tokens=1500", "evaluation.every=0")  # the model has 256 positions
    process = start(command(base_folder, tmp_path, *VLLM, *too_long), log)
    assert process.wait(timeout=300) == 1, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    told = r"error: .* failed: vLLM's engine did not start: .*max_model_len \(\d+\) is greater than the derived"
    assert re.match(told, last), last
    found = re.search(r"; its log is in (\S+)$", last)
    assert found is not None and Path(found[1]).is_dir(), last
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
def test_a_killed_run_leaves_no_engine(base_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(command(base_folder, tmp_path, *VLLM, "evaluation.every=0", ENDLESS), log)
    wait_for(log, "policy 1/", process, timeout_s=300)
    family = family_of(process)
    engine = engine_of(process, "RolloutActor")
    (actor,) = named(family, "ray::RolloutActor")
    actor.kill()
    engine.wait(timeout=5)
    engines = named(family, "VLLM::EngineCore")
    assert engines
    process.kill()
    process.wait()
    assert_nothing_left(engines)
