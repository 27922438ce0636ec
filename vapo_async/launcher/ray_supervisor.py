"""Keeps the rollout workers going: starts them, hands them weights, notices their deaths, replaces them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from vapo_async.build import derived_seed, engine_seed
from vapo_async.config import Config, RayLauncherConfig
from vapo_async.launcher.ray_calls import answer, reason
from vapo_async.launcher.ray_flow import Progress
from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.launcher.ray_worker import Worker
from vapo_async.schema import Response
from vapo_async.stages import StageDiedError
from vapo_async.weights.broadcast import Broadcast

STAGE = "rollout worker"


class RolloutWorkers:
    """Everything happens in the driver's thread, in whatever wait it is: see :class:`.ray_inbox.Inbox`.

    A worker is lost when its process ends, when its engine raises, when it does not come up within
    ``launcher.start_timeout_s``, or when it does not answer a ping within ``launcher.engine_timeout_s``. Its tickets
    are refunded and another process takes its place, ``launcher.max_restarts`` times.

    Args:
        config: of the run.
        launcher: the limits.
        inbox: what the driver waits on.
        flow: the flow's actor.
        spawn: starts the process of worker ``index`` under the name of an ``owner``.
        fail: told once the run cannot go on.
        note: told what is worth a line.
        logs: where a dead process may have left its reason.
    """

    def __init__(
        self,
        config: Config,
        launcher: RayLauncherConfig,
        inbox: Inbox,
        flow: Any,
        spawn: Callable[[int, str], Any],
        fail: Callable[[BaseException], None],
        note: Callable[[str], None],
        logs: str,
    ) -> None:
        self._config, self._launcher, self._inbox, self._flow = config, launcher, inbox, flow
        self._spawn, self._fail, self._note, self._logs = spawn, fail, note, logs
        self._incarnations: dict[int, int] = {}
        self._generating = self._closed = False
        self._version = 0
        self._weights: Callable[[], Sequence[Any]] | None = None  # references to the newest; None: the base's
        self._weights_version = 0  # the first one that has them
        self._broadcasts: Mapping[str, Broadcast] = {}  # of the newest version
        self._before: dict[str, Progress] = {}  # of those that are gone
        self.workers = [self._start(index) for index in range(launcher.rollout_workers)]

    @property
    def restarts(self) -> dict[str, int]:
        """Replacements so far, of those that died."""
        return {f"{STAGE} {index}": n - 1 for index, n in self._incarnations.items() if n > 1}

    def starting(self) -> list[str]:
        """Who has not come up yet."""
        return [worker.owner for worker in self.workers if not worker.up]

    def begin(self) -> None:
        """Has everybody generate; again and again changes nothing."""
        if not self._generating:
            self._generating = True
            for worker in self.workers:
                self._go_on(worker)

    def close(self) -> None:
        """The flow is closed: who dies now is not replaced."""
        self._closed = True

    def hand(
        self,
        version: int,
        weights: Callable[[], Sequence[Any]] | None,
        broadcasts: Mapping[str, Broadcast] | None = None,
    ) -> None:
        """A new version, for everybody.

        Args:
            version: above all before it.
            weights: gives references to their shares; None: they are those of the version before.
            broadcasts: by owner, for those that take part in one instead.
        """
        self._version, self._broadcasts = version, broadcasts or {}
        if weights is not None:
            self._weights, self._weights_version = weights, version
        for worker in self.workers:
            if worker.running:
                self._go_on(worker)

    def up_to_date(self) -> list[str]:
        """Who generates with the newest version."""
        return [worker.owner for worker in self.workers if worker.running and worker.version == self._version]

    def all_live(self, owners: Iterable[str]) -> bool:
        """Whether none of them was lost."""
        return set(owners) <= {worker.owner for worker in self.workers if not worker.lost}

    def handing(self) -> bool:
        """Whether somebody is just given a version."""
        return any(worker.handing and not worker.lost for worker in self.workers)

    def without(self, version: int) -> list[str]:
        """Who generates and has not confirmed the version. Those that start will have it before they generate."""
        return [worker.owner for worker in self.workers if worker.running and worker.version < version]

    def progress(self, until: float) -> dict[str, Progress]:
        """By owner, what each has done; of those that are gone or do not answer in time, what is known."""
        self._ask(lambda worker: worker.actor.progress.remote(), self._note_progress, until)
        return self._before | {worker.owner: worker.progress for worker in self.workers}

    def partial_groups(self, until: float) -> dict[int, list[Response]]:
        """By ticket, the responses so far. A worker that does not answer in time leaves its own out, with a note."""
        groups: dict[int, list[Response]] = {}
        limit = until - time.monotonic()
        silent = self._ask(
            lambda worker: worker.actor.partial_groups.remote(), lambda _, answer: groups.update(answer), until
        )
        for worker in silent:
            self._note(
                f"the checkpoint has no unfinished responses of {worker.owner}: it did not answer within {limit:.0f} s"
            )
        return groups

    def due_at(self) -> float:
        """When somebody has to be looked at next."""
        return min((worker.due_at(self._launcher) for worker in self._watched()), default=float("inf"))

    def look(self, now: float) -> None:
        """Replaces who has been silent for too long, and asks who has been silent for long for a sign of life."""
        for worker in list(self._watched()):
            if worker.due_at(self._launcher) > now:
                continue
            if (why := worker.why_silent(self._launcher, now)) is not None:
                self._lose(worker, why)
            else:
                worker.asked_at = now
                self._inbox.watch(worker.actor.ping.remote(), partial(self._on_ping, worker))

    def _watched(self) -> Iterable[Worker]:
        if not self._generating:
            return ()  # the start of all has its own limit
        return (worker for worker in self.workers if worker.watched)

    def _start(self, index: int) -> Worker:
        incarnation = self._incarnations[index] = self._incarnations.get(index, 0) + 1
        owner = f"{STAGE} {index}" + (f" ({incarnation})" if incarnation > 1 else "")
        worker = Worker(index, owner, self._spawn(index, owner))
        self._inbox.watch(worker.actor.ping.remote(), partial(self._on_ping, worker))
        return worker

    def _go_on(self, worker: Worker) -> None:
        """The next thing for a worker: the newest weights, one publication at a time, then to generate."""
        if not worker.up or worker.lost or worker.handing:
            return
        if not worker.running:
            worker.heard_at = time.monotonic()  # it rested: nobody has asked it for a sign of life
        if worker.version < self._version:
            worker.handing = True
            broadcast = self._broadcasts.get(worker.owner) if worker.version == self._version - 1 else None
            shares: Sequence[Any] = ()
            if broadcast is None and self._weights is not None and worker.version < self._weights_version:
                shares = self._weights()
            handed = partial(self._on_handed, worker, self._version)
            self._inbox.watch(worker.actor.publish.remote(self._version, broadcast, *shares), handed)
        elif not worker.running and not self._closed:
            worker.running = True
            self._inbox.watch(worker.actor.run.remote(self._seed(worker)), partial(self._on_ended, worker))

    def _seed(self, worker: Worker) -> int:
        """Another process draws from another stream: the same tokens again would be no new samples."""
        if self._incarnations[worker.index] == 1:
            return engine_seed(self._config, worker.index, self._version)
        return derived_seed(self._config.seed, f"engine/{worker.owner}/{self._version}")

    def _heard(self, worker: Worker, future: Future[Any], *, alone: bool = True) -> bool:
        """Whether the worker answered; takes note of it, or of its death. ``alone``: an error can only be its own."""
        if worker.lost:
            return False
        error = future.exception()
        if error is None:
            worker.heard()
            return True
        own = (None, worker.actor._actor_id.hex())  # not that of the learner, whose weights did not come
        died = isinstance(error, RayActorError) and (error.actor_init_failed or error.actor_id in own)
        if died or (alone and isinstance(error, RayTaskError)):
            self._lose(worker, reason(error))
        else:
            self._failed(worker, future)
        return False

    def _on_ping(self, worker: Worker, future: Future[Any]) -> None:
        if self._heard(worker, future) and not worker.up:
            worker.up = True
            if self._generating:
                self._go_on(worker)

    def _on_handed(self, worker: Worker, version: int, future: Future[Any]) -> None:
        worker.handing = False
        if self._heard(worker, future, alone=False):  # the weights are the learner's
            worker.version = version
            self._go_on(worker)

    def _on_ended(self, worker: Worker, future: Future[Any]) -> None:
        worker.running = False
        if self._heard(worker, future) and (failure := future.result()) is not None:
            self._failed(worker, _failed_future(failure))

    def _failed(self, worker: Worker, future: Future[Any]) -> None:
        """A stage that the worker talks to failed, so nobody could take its place."""
        try:
            answer(future, f"{worker.owner}, which waited for a stage", self._logs)
        except Exception as error:  # noqa: BLE001 (handed on to whom the driver answers)
            self._fail(error)

    def _lose(self, worker: Worker, why: str) -> None:
        """Ends an incarnation for good, gives its tickets back and has another take its place."""
        worker.lost, worker.running = True, False
        self._before[worker.owner] = worker.progress
        ray.kill(worker.actor)  # a process that hangs, or one whose engine raised
        if not self._generating:
            self._fail(StageDiedError(f"{worker.owner} did not come up: {why}"))
            return
        self._inbox.watch(self._flow.lose.remote(worker.owner), _ignore)  # if the flow is dead, others will say so
        if self._closed:
            return
        deaths = self._incarnations[worker.index]
        allowed = self._launcher.max_restarts
        if deaths > allowed:
            times = "once" if deaths == 1 else f"{deaths} times"
            self._fail(
                StageDiedError(
                    f"{STAGE} {worker.index} died {times}, the last time because {why}, and "
                    f"launcher.max_restarts={allowed} allows no further replacement; see {self._logs}"
                )
            )
            return
        self.workers[worker.index] = self._start(worker.index)
        self._note(f"{STAGE} {worker.index} is replaced ({deaths} of {allowed} replacements): {why}")

    def _ask(self, ask: Callable[[Worker], Any], take: Callable[[Worker, Any], None], until: float) -> list[Worker]:
        """Asks everybody who has begun, waits for those that live. Returns who is alive and did not answer in time."""
        waiting = {worker for worker in self.workers if worker.version >= 0 and not worker.lost}

        def on_answer(worker: Worker, future: Future[Any]) -> None:
            if self._heard(worker, future):
                take(worker, future.result())
            waiting.discard(worker)

        for worker in list(waiting):
            self._inbox.watch(ask(worker), partial(on_answer, worker))
        self._inbox.wait(lambda: all(worker.lost for worker in waiting), until)
        return [worker for worker in waiting if not worker.lost]

    def _note_progress(self, worker: Worker, progress: Progress) -> None:
        worker.progress = progress


def _failed_future(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def _ignore(future: Future[Any]) -> None:
    """For an answer that nobody needs."""
