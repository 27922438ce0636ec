"""Broadcasts of a real learner's actor to rollout workers of which some come late, die or never join.

The engines are stand-ins that take their part when the test says so. gloo's end waits for who does not come, as NCCL's
does; gloo gives up after a time.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from conftest import tiny_overrides
from torch import Tensor

from vapo_async.build import BaseModel
from vapo_async.config import Config, RayLauncherConfig, RunError
from vapo_async.config.load import load_config
from vapo_async.launcher.ray_broadcast import Broadcasts
from vapo_async.launcher.ray_cluster import placement, start_ray
from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.launcher.ray_start import Actors
from vapo_async.launcher.ray_supervisor import RolloutWorkers
from vapo_async.stages import StageTimeoutError
from vapo_async.weights.broadcast import Group, Layout
from vapo_async.weights.gloo import join
from vapo_async.weights.travel import to_tensors

pytestmark = pytest.mark.ray

SOON_S = 60


def stand_in(up: bool) -> Any:
    """A rollout worker's actor; the class travels by value, as other processes do not find this module."""

    class Engine:
        def __init__(self) -> None:
            self._up, self._told = threading.Event(), threading.Event()
            if up:
                self._up.set()
            self._part: Any = None
            self._taken: Any = None

        def ping(self) -> None:
            self._up.wait()

        def come_up(self) -> None:
            self._up.set()

        def publish(self, version: int, broadcast: Any, *shares: Any) -> None:
            if broadcast is not None:
                self._part = version, broadcast
                self._told.set()
            elif shares:
                self._taken = version, shares

        def told(self) -> None:
            """Returns once it is to join a broadcast."""
            self._told.wait()

        def take_part(self) -> None:
            from vapo_async.weights.gloo import join
            from vapo_async.weights.travel import to_arrays

            version, part = self._part
            group = join(part.group.host, part.group.port, part.group.first_rank(part.owner), part.group.world_size)
            received = {}
            for name, shape in zip(part.layout.names, part.layout.shapes, strict=True):
                received[name] = torch.empty(shape)
                group.broadcast(received[name], 0).wait()
            self._taken = version, (to_arrays(received),)

        def taken(self) -> Any:
            """A version and shares of its weights."""
            return self._taken

        def run(self, seed: int) -> None:
            threading.Event().wait()

    return ray.remote(max_concurrency=8, num_cpus=0)(Engine).remote()


def flow() -> Any:
    """Who is told of lost workers."""

    class Flow:
        def lose(self, owner: str) -> None:
            pass

    return ray.remote(num_cpus=0)(Flow).remote()


def slow_rank(s: float) -> Any:
    """Another rank of the learner, which leaves a broadcast that much later."""

    class Rank:
        def broadcast(self, version: int, group: Any, anew: bool) -> None:
            time.sleep(s)

        def sent(self, version: int) -> dict[str, Any]:
            return {}

    return ray.remote(num_cpus=0)(Rank).remote()


@pytest.fixture(scope="module")
def config(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config([*tiny_overrides(base_folder, tmp_path_factory.mktemp("runs")), "launcher=ray"])


@pytest.fixture(scope="module")
def learner(config: Config, base_folder: Path) -> Iterator[Any]:
    assert isinstance(config.launcher, RayLauncherConfig)
    start_ray(config.launcher, cpus=1)
    try:
        base = BaseModel(base_folder, base_folder)
        actors = Actors(config, config.launcher, base, placement(config, config.launcher))
        (rank,) = actors.learner(time.monotonic() + SOON_S)
        ray.get(rank.build.remote(None), timeout=2 * SOON_S)
        yield rank
    finally:
        ray.shutdown()


def change_weights(learner: Any) -> dict[str, Tensor]:
    """As an update does; what they are then."""

    def change(actor: Any) -> None:
        with torch.no_grad():
            for parameter in actor._learner.policy.parameters():
                parameter.add_(1)

    ray.get(learner.__ray_call__.remote(change), timeout=SOON_S)
    return to_tensors(ray.get(learner.weights.remote()[1], timeout=SOON_S))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_who_asks_during_a_broadcast_gets_what_it_sends(learner: Any) -> None:
    layout: Layout = ray.get(learner.layout.remote(), timeout=SOON_S)
    for version in (1, 2):  # no other before, and another one before
        expected = change_weights(learner)
        host, port = ray.get(learner.meeting_point.remote(), timeout=SOON_S)
        broadcast = learner.broadcast.remote(version, Group(host, port, ("this process",), 1), True)
        asked = learner.sent.remote(version)
        assert ray.wait([asked], timeout=1)[0] == [], "the learner waits for this process to join"
        group = join(host, port, 1, 2)
        received = {name: torch.empty(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}
        for tensor in received.values():
            group.broadcast(tensor, 0).wait()
        ray.get(broadcast, timeout=SOON_S)
        assert_equal(received, expected)
        assert_equal(to_tensors(ray.get(asked, timeout=SOON_S)), expected)
    with pytest.raises(RunError, match=r"rank 0 was asked for version 1 and has kept version 2"):
        ray.get(learner.sent.remote(1), timeout=SOON_S)


class Driver:
    """Inbox, supervisor and broadcasts as a run has them, with two workers that have the base's weights."""

    def __init__(self, config: Config, ranks: list[Any], **limits: float) -> None:
        self.launcher = RayLauncherConfig(rollout_workers=2, **limits)  # type: ignore[arg-type]
        self.inbox, self.failures, self.notes = Inbox(), list[BaseException](), list[str]()
        self.spawned: dict[str, Any] = {}
        told = (self.failures.append, self.notes.append, "the logs")
        self.workers = RolloutWorkers(config, self.launcher, self.inbox, flow(), self._spawn, *told)
        self.broadcasts = Broadcasts(self.inbox, self.launcher, ranks, self.workers, 1, "the logs")
        self.wait(lambda: not self.workers.starting())
        self.workers.begin()
        self.wait(lambda: len(self.workers.up_to_date()) == 2)
        self.inbox.timers = self.workers

    def _spawn(self, index: int, owner: str) -> Any:
        self.spawned[owner] = stand_in(up=owner.endswith(str(index)))  # a replacement waits for the test
        return self.spawned[owner]

    def wait(self, done: Callable[[], bool]) -> None:
        assert self.inbox.wait(done, time.monotonic() + SOON_S), self.notes
        assert not self.failures

    def publish(self, meanwhile: Callable[[], None]) -> None:
        """Version 1, with ``meanwhile`` in a thread."""
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(meanwhile)
            try:
                self.broadcasts.publish(1)
            finally:
                other.result(SOON_S)

    def ask(self, owner: str, question: str) -> Any:
        """Of any thread."""
        return ray.get(getattr(self.spawned[owner], question).remote(), timeout=SOON_S)

    def assert_has(self, owner: str, expected: dict[str, Tensor]) -> None:
        """Version 1 and its weights, by the supervisor's word and in fact."""
        (worker,) = [worker for worker in self.workers.workers if worker.owner == owner]
        self.wait(lambda: worker.running)
        assert worker.version == 1
        version, shares = self.ask(owner, "taken")
        assert version == 1
        assert_equal(to_tensors(*shares), expected)


def test_a_worker_that_comes_up_during_a_broadcast_gets_its_version(config: Config, learner: Any) -> None:
    driver = Driver(config, [learner])
    ray.kill(driver.spawned["rollout worker 1"])
    driver.wait(lambda: "rollout worker 1 (2)" in driver.spawned)
    expected = change_weights(learner)

    def meanwhile() -> None:
        driver.ask("rollout worker 0", "told")
        driver.ask("rollout worker 1 (2)", "come_up")
        time.sleep(1)  # it is given its weights here; too early if the learner has them at hand
        driver.ask("rollout worker 0", "take_part")

    driver.publish(meanwhile)
    driver.assert_has("rollout worker 0", expected)
    driver.assert_has("rollout worker 1 (2)", expected)
    driver.broadcasts.check()


def give_up_after(learner: Any, s: float) -> None:
    """gloo's limit in the learner's process."""

    def limit(actor: Any) -> None:
        from datetime import timedelta

        from vapo_async.weights import gloo

        gloo.TIMEOUT = timedelta(seconds=s)

    ray.get(learner.__ray_call__.remote(limit), timeout=SOON_S)


def test_a_broadcast_that_fails_with_a_worker_has_ended_for_all_ranks(config: Config, learner: Any) -> None:
    give_up_after(learner, 2)
    expected, slower_s = change_weights(learner), 5.0
    driver = Driver(config, [learner, slow_rank(slower_s)])
    owner, start = "rollout worker 0", time.monotonic()

    def meanwhile() -> None:
        driver.ask(owner, "told")
        ray.kill(driver.spawned[owner])

    driver.publish(meanwhile)
    assert time.monotonic() - start >= slower_s, "the next update would meet a rank that is in the broadcast"
    driver.broadcasts.check()
    driver.wait(lambda: f"{owner} (2)" in driver.spawned)
    driver.ask(f"{owner} (2)", "come_up")
    driver.assert_has(f"{owner} (2)", expected)


def test_a_broadcast_that_hangs_ends_the_run_though_a_worker_died(config: Config, learner: Any) -> None:
    give_up_after(learner, 600)
    driver = Driver(config, [learner], engine_timeout_s=3, stage_timeout_s=20)
    start = time.monotonic()

    def meanwhile() -> None:
        driver.ask("rollout worker 1", "told")
        ray.kill(driver.spawned["rollout worker 0"])

    with pytest.raises(StageTimeoutError) as caught:
        driver.publish(meanwhile)
    assert 6 <= time.monotonic() - start < 18, "twice the engines' limit, not the stages'"
    assert str(caught.value) == (
        "the learner's broadcast of version 1 to rollout worker 0, rollout worker 1 did not end within 6 s, twice "
        "launcher.engine_timeout_s: it lost rollout worker 0; resume=auto goes on from the last checkpoint"
    )
    with pytest.raises(StageTimeoutError, match=r"^the learner hangs in a broadcast and cannot be saved$"):
        driver.broadcasts.check()
