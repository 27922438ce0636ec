"""Evaluations by a real actor that dies: each has its result, in the order of their start."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray._private import ray_constants

from vapo_async.config import RayLauncherConfig
from vapo_async.interrupts import NOW
from vapo_async.launcher.preflight import LOOPBACK
from vapo_async.launcher.ray_actors import GROUPS
from vapo_async.launcher.ray_cluster import start_ray
from vapo_async.launcher.ray_evaluations import Evaluations
from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.stages import EvaluationResult

pytestmark = pytest.mark.ray


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    assert start_ray(RayLauncherConfig(), cpus=1) and ray.nodes()[0]["NodeManagerAddress"] == LOOPBACK
    assert ray_constants.ENABLE_RAY_CLUSTER, "Ray's own setting is as before: another cluster may be made here later"
    yield Inbox()
    ray.shutdown()


def evaluator() -> Any:
    """An actor; its class travels by value, as other processes do not find this module."""

    class Evaluator:
        """Takes its time; the result says how many evaluations its process has made, this one included."""

        def __init__(self) -> None:
            time.sleep(2)  # what an engine takes to start
            self._made = 0

        def evaluate(self, step: int, verifier: None, *shares: object) -> EvaluationResult:
            time.sleep(0.5)
            self._made += 1
            return EvaluationResult(step, [[True]], float(self._made))

        def pid(self) -> int:
            return os.getpid()

    options = {"max_restarts": 1, "max_task_retries": -1, "concurrency_groups": GROUPS, "num_cpus": 0}
    return ray.remote(**options)(Evaluator).remote()


def test_those_that_wait_keep_their_order_when_the_evaluator_dies(inbox: Inbox) -> None:
    actor = evaluator()
    pid = ray.get(actor.pid.remote())
    evaluations = Evaluations(inbox, RayLauncherConfig(), actor, None, "nowhere")
    evaluations.start(0, [ray.put(bytes(1_000_000))])
    evaluations.start(10, [ray.put(bytes(1_000_000))])
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    time.sleep(1)  # while another process starts
    evaluations.start(40, [ray.put(bytes(1_000_000))])
    assert evaluations.running == 3
    asked = [evaluation.reference is not None for evaluation in evaluations._started]
    assert asked == [True, False, False], "what was not asked for is not repeated, before what was"
    results = []
    while evaluations.running:
        inbox.wait(lambda: False, time.monotonic() + 0.1)  # what a driver does that waits for something else
        results += evaluations.finished(NOW)
    assert [result.step for result in results] == [0, 10, 40]
    assert [result.mean_length for result in results] == [1, 2, 3], "by one process, in that order"
