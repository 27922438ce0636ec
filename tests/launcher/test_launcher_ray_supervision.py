"""One set of real Ray stages, whose processes are killed and stopped one after the other while batches are trained."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import tiny_overrides

from vapo_async.build import BaseModel
from vapo_async.config import Config, RayLauncherConfig, RunError
from vapo_async.config.load import load_config
from vapo_async.interrupts import NOW
from vapo_async.launcher.ray_stages import RayStages
from vapo_async.launcher.ray_supervisor import Worker
from vapo_async.stages import FlowStats, StageDiedError, StageTimeoutError
from vapo_async.state import read_state

pytestmark = pytest.mark.ray

S = 2
B = 2


class Never:
    """A stop that does not come."""

    def __call__(self) -> bool:
        return False

    def on_request(self, wake: Callable[[], None]) -> None:
        pass


class Harness:
    """The stages with what a test wants to see of them."""

    def __init__(self, config: Config, base: Path) -> None:
        assert isinstance(config.launcher, RayLauncherConfig)
        self.launcher = config.launcher
        self.notes: list[str] = []
        self.stages = RayStages(config, config.launcher, BaseModel(base, base), self.notes.append)
        self.trained: list[int] = []

    def turn(self, policy_changed: bool = True) -> None:
        batch = self.stages.take(Never())
        assert batch is not None
        assert all(0 <= age <= S for age in batch.ages)
        self.trained += batch.tickets
        self.stages.learn(batch)
        self.stages.publish(policy_changed)

    def turn_until(self, holds: Callable[[], bool], *, policy_changed: bool = True, limit_s: float = 90) -> int:
        """Returns the number of turns."""
        deadline, turns = time.monotonic() + limit_s, 0
        while not holds():
            assert time.monotonic() < deadline, self.notes
            self.turn(policy_changed)
            turns += 1
        return turns

    def worker(self, index: int) -> Worker:
        return self.stages._workers.workers[index]

    def balanced_stats(self) -> FlowStats:
        stats = self.stages.stats()
        tickets = stats.flow.tickets
        assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
        assert len(self.trained) == len(set(self.trained)), "a ticket was trained on twice"
        assert tickets["committed"] >= len(self.trained)
        return stats


def ask(actor: Any, question: Callable[[Any], Any]) -> Any:
    """Answered inside the actor's process."""
    import ray

    return ray.get(actor.__ray_call__.remote(question), timeout=60)


def psutil_of(stage: str) -> psutil.Process:
    """The process of a stage, also of one that is busy."""
    family = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    (found,) = [child for child in family if f"ray::{stage}" in " ".join(child.cmdline())]
    return found


def pid(actor: Any) -> int:
    found = ask(actor, lambda self: os.getpid())
    assert isinstance(found, int)
    return found


@pytest.fixture(scope="module")
def harness(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    config = load_config(
        [
            *tiny_overrides(base_folder, tmp_path_factory.mktemp("runs")),
            "launcher=ray",
            "launcher.rollout_workers=2",
            "launcher.max_restarts=2",
            "task.max_response_tokens=60",
            f"buffer.max_staleness={S}",
        ]
    )
    others = set(psutil.Process().children(recursive=True))  # other tests'
    harness = Harness(config, base_folder)
    yield harness
    family = set(psutil.Process().children(recursive=True)) - others
    harness.stages.shutdown()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def checksum(module: str) -> Callable[[Any], float]:
    """Of the parameters of ``self.<module>`` in an actor."""

    def total(actor: Any) -> float:
        from functools import reduce

        found: Any = reduce(getattr, module.split("."), actor)
        return sum(float(p.detach().double().sum()) for p in found.parameters())

    return total


def test_a_killed_worker_is_replaced_while_the_other_one_delivers(harness: Harness) -> None:
    harness.turn_until(lambda: harness.worker(0).running, policy_changed=False)
    harness.turn(policy_changed=True)
    published = ask(harness.stages._learner[0], checksum("_learner.policy"))
    dead = harness.worker(0)
    os.kill(pid(dead.actor), signal.SIGKILL)
    harness.turn_until(lambda: harness.worker(0) is not dead, policy_changed=False, limit_s=20)
    new = harness.worker(0)
    assert new.owner == "rollout worker 0 (2)"
    turns = harness.turn_until(lambda: new.running, policy_changed=False)
    assert turns >= 2, "batches come before the replacement is up"
    assert harness.notes == ["rollout worker 0 is replaced (1 of 2 replacements): its process died"]
    stats = harness.balanced_stats()
    assert stats.restarts == {"rollout worker 0": 1}
    assert 1 <= stats.flow.refund_reasons["worker lost"] <= 2, "what one worker held: ceil(6 slots / 4) tickets"
    assert stats.verdict_wait_s > 0
    harness.turn(policy_changed=False)  # it has generated by now
    assert ask(new.actor, checksum("_collector._engine._model")) == published, "the newest weights that were published"
    assert new.version == harness.stages._version


def test_killed_verifier_and_evaluator_lose_no_group_and_no_evaluation(harness: Harness) -> None:
    before = harness.balanced_stats().flow.refund_reasons
    harness.stages.start_evaluation(harness.stages._version)
    psutil_of("EvaluatorActor").kill()
    psutil_of("VerifierActor").kill()
    services = harness.stages._services
    harness.turn_until(lambda: services.restarts.keys() == {"verifier", "evaluator"}, limit_s=60)
    for _ in range(3):
        harness.turn()
    (evaluation,) = harness.stages.finished_evaluations(Never())
    assert [len(samples) for samples in evaluation.correct] == [2] * 4
    stats = harness.balanced_stats()
    assert stats.restarts["verifier"] == stats.restarts["evaluator"] == 1
    assert stats.flow.refund_reasons == before
    assert stats.verifier["scored"] >= 4 * len(harness.trained) - 4 * 2, "the counters go on where they were"


def test_an_evaluation_that_fails_is_an_error_of_the_run_and_one_that_hangs_ends_at_its_limit(harness: Harness) -> None:
    stages = harness.stages
    ask(stages._evaluator, lambda self: setattr(self._evaluator, "sample", lambda *_: 1 // 0))
    stages.start_evaluation(0)
    with pytest.raises(RunError, match=r"^the evaluator: it raised ZeroDivisionError: integer division or modulo") as e:
        stages.finished_evaluations(Never())
    assert "\n" not in str(e.value)
    assert stages.evaluations_running == 0
    ask(stages._evaluator, lambda self: setattr(self._evaluator, "sample", lambda *_: __import__("time").sleep(3600)))
    harness.launcher.evaluation_timeout_s = 1
    stages.start_evaluation(0)
    harness.launcher.evaluation_timeout_s = 120
    assert stages.finished_evaluations(NOW) == []
    assert stages.evaluations_running == 1
    time.sleep(1)
    with pytest.raises(StageTimeoutError, match=r"launcher\.evaluation_timeout_s"):
        stages.finished_evaluations(NOW)
    assert stages.evaluations_running == 0
    stages.start_evaluation(harness.stages._version)
    (evaluation,) = stages.finished_evaluations(Never())
    assert [len(samples) for samples in evaluation.correct] == [2] * 4, "by a new process, that does not repeat the old"
    harness.turn_until(lambda: stages._services.restarts["evaluator"] == 2, limit_s=20)


def test_a_stopped_worker_is_noticed_and_replaced(harness: Harness) -> None:
    """Its own watchdog is stopped with it."""
    harness.launcher.engine_timeout_s = 3
    dead = harness.worker(1)
    process = psutil.Process(pid(dead.actor))
    process.suspend()
    start = time.monotonic()
    harness.turn_until(lambda: harness.worker(1) is not dead, limit_s=60)
    assert 3 <= time.monotonic() - start < 40, "between one and two limits, and a turn on a busy machine"
    harness.launcher.engine_timeout_s = 60
    harness.turn_until(lambda: harness.worker(1).running)
    found = re.fullmatch(
        r"rollout worker 1 is replaced \(1 of 2 replacements\): "
        r"it gave no sign of life for (\d+) s \(launcher.engine_timeout_s=3\)",
        harness.notes[-1],
    )
    assert found is not None, harness.notes
    assert 3 <= int(found[1]) <= 40
    assert not process.is_running()
    assert harness.balanced_stats().restarts["rollout worker 1"] == 1


def test_a_worker_whose_engine_raises_is_replaced(harness: Harness) -> None:
    dead = harness.worker(1)
    process = psutil.Process(pid(dead.actor))
    ask(dead.actor, lambda self: setattr(self._collector, "step", lambda: 1 // 0))
    harness.turn_until(lambda: harness.worker(1) is not dead, limit_s=30)
    assert harness.notes[-1] == (
        "rollout worker 1 is replaced (2 of 2 replacements): "
        "it raised ZeroDivisionError: integer division or modulo by zero"
    )
    process.wait(timeout=15)


def test_a_checkpoint_holds_what_is_in_flight_and_does_without_a_worker_that_died(
    harness: Harness, tmp_path: Path
) -> None:
    harness.turn()
    (tmp_path / "whole").mkdir()
    harness.stages.save(tmp_path / "whole")
    state = read_state(tmp_path / "whole", "flow")
    assert not set(map(int, state.data["prompts"])) & set(harness.trained)
    dead = harness.worker(0)
    os.kill(pid(dead.actor), signal.SIGKILL)
    (tmp_path / "less").mkdir()
    harness.stages.save(tmp_path / "less")
    assert dead.lost
    assert (tmp_path / "less" / "policy").is_dir()


def test_a_replacement_that_does_not_start_counts_as_a_death_and_the_budget_ends_the_run(harness: Harness) -> None:
    assert harness.stages._workers.restarts["rollout worker 0"] == 2
    harness.launcher.start_timeout_s = 0.1
    with pytest.raises(StageDiedError) as caught:
        harness.turn_until(lambda: False, limit_s=20)
    harness.launcher.start_timeout_s = 120
    assert re.fullmatch(
        r"rollout worker \d died 3 times, the last time because it did not start within 0.1 s, and "
        r"launcher.max_restarts=2 allows no further replacement; see logs/ in the run folder",
        str(caught.value),
    )


def test_after_that_there_still_is_a_whole_checkpoint(harness: Harness, tmp_path: Path) -> None:
    with pytest.raises(StageDiedError, match="died 3 times"):
        harness.stages.take(Never())
    assert harness.stages._take is None, "a batch that comes now would be in no checkpoint"
    harness.stages.save(tmp_path)
    assert (tmp_path / "policy").is_dir()
    assert json.loads((tmp_path / "flow.json").read_text())["buffer"]
    harness.balanced_stats()
