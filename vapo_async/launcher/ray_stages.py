"""Every stage in a Ray actor of its own: generation goes on while the learner learns.

The driver waits on one inbox, whoever it waits for; what happens meanwhile (a dead worker, an evaluation that ended) is
handled there. No wait is without a limit of ``launcher``'s.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from vapo_async.build import BaseModel
from vapo_async.config import (
    Config,
    RayLauncherConfig,
    RunError,
    VLLMEngineConfig,
    WeightTransport,
)
from vapo_async.interrupts import Stop
from vapo_async.launcher.ray_answers import Answers
from vapo_async.launcher.ray_broadcast import Broadcasts
from vapo_async.launcher.ray_calls import answer
from vapo_async.launcher.ray_cluster import (
    check_resources,
    cluster_nodes,
    keep_logs,
    local_logs,
    placement,
    start_ray,
)
from vapo_async.launcher.ray_evaluations import Evaluations
from vapo_async.launcher.ray_flow import Progress
from vapo_async.launcher.ray_inbox import Call, Inbox
from vapo_async.launcher.ray_services import Counters, Services
from vapo_async.launcher.ray_start import Actors
from vapo_async.launcher.ray_supervisor import RolloutWorkers
from vapo_async.learner.learner import UpdateResult
from vapo_async.stages import EvaluationResult, FlowStats, StageDiedError, StageTimeoutError, TakenBatch


class RayStages:
    """See :class:`vapo_async.stages.Stages`.

    Args:
        config: of the run.
        launcher: its limits.
        base: folders of the base model.
        note: told what is worth a line, a process that was replaced for example.
    """

    def __init__(
        self,
        config: Config,
        launcher: RayLauncherConfig,
        base: BaseModel,
        note: Callable[[str], None],
    ) -> None:
        self._config, self._launcher, self._base = config, launcher, base
        self._inbox = Inbox()
        self._failure: BaseException | None = None
        self._take: Call | None = None
        self._version = 0
        self._verdicts = Counters()
        placed = placement(config, launcher)
        self._actors = Actors(config, launcher, base, placed)
        self._local = start_ray(launcher, cpus=sum(r.num_cpus for r in placed.all))
        self._logs = local_logs() if self._local else None
        self._where = "logs/ in the run folder" if self._local else "Ray's logs on its nodes"
        self._answers = Answers(self._inbox, launcher.stage_timeout_s, self._where)
        try:
            check_resources(placed.all, cluster_nodes())
            deadline = time.monotonic() + launcher.start_timeout_s
            self._flow, self._verifier = self._actors.flow(), self._actors.verifier()
            self._learner = self._actors.learner(deadline)
            self._evaluator = self._actors.evaluator()
            self._evaluations = Evaluations(self._inbox, launcher, self._evaluator, self._verifier, self._where)
            told = (self._fail, note, self._where)
            self._workers = RolloutWorkers(config, launcher, self._inbox, self._flow, self._spawn, *told)
            self._broadcasts: Broadcasts | None = None
            if ranks := _engine_ranks(config):
                ends = (self._learner, self._workers, ranks, self._where)
                self._broadcasts = Broadcasts(self._inbox, launcher, *ends)
            self._services = Services(self._inbox, launcher.max_restarts, *told)
            self._wait_for_start(deadline)
        except BaseException:
            self.shutdown()
            raise
        self._inbox.timers = self._workers

    def take(self, stop: Stop) -> TakenBatch | None:
        if self._failure is not None:
            raise self._failure
        stop.on_request(self._inbox.wake)
        self._workers.begin()
        if self._take is None:
            self._take = self._inbox.call(self._flow.take.remote())
        take, limit = self._take, self._launcher.stage_timeout_s
        if not self._answers.wait(lambda: take.done or self._failure is not None or stop(), limit):
            why = self._answers.get(self._flow.why_waiting.remote(), "the flow", 10)
            self._fail(
                StageTimeoutError(
                    f"the learner waited {limit:.0f} s for a batch: {why}; "
                    "raise launcher.stage_timeout_s if the work is that slow"
                )
            )
        if take.done:
            return self._taken()
        if self._failure is not None:
            return self._last_batch(self._failure)
        return self.stop_taking()

    def learn(self, batch: TakenBatch) -> UpdateResult:
        asked = [rank.update.remote(batch.handle, batch.version) for rank in self._learner]
        result: UpdateResult = self._answers.all(asked, "the learner")[0]
        return result

    def publish(self, policy_changed: bool) -> int:
        version = self._version + 1
        if policy_changed and self._broadcasts is not None:
            self._broadcasts.publish(version)
        else:
            self._hand(version, policy_changed)
        limit = self._launcher.stage_timeout_s
        if not self._answers.wait(lambda: not self._workers.without(version) or self._failure is not None, limit):
            who = ", ".join(self._workers.without(version))
            raise StageTimeoutError(
                f"the learner waited {limit:.0f} s for {who} to take the weights of version {version}"
            )
        self._version = self._answers.get(self._flow.publish.remote(), "the flow")
        return self._version

    def start_evaluation(self, step: int) -> None:
        self._evaluations.start(step, [rank.weights.remote()[1] for rank in self._learner] if step else [])

    @property
    def evaluations_running(self) -> int:
        return self._evaluations.running

    def finished_evaluations(self, stop: Stop) -> list[EvaluationResult]:
        return self._evaluations.finished(stop)

    def stop_taking(self) -> TakenBatch | None:
        self._workers.close()
        self._answers.get(self._flow.close.remote(), "the flow")
        if self._take is None:
            return None
        return self._taken()  # a closed flow answers at once

    def stats(self) -> FlowStats:
        limit = self._launcher.stage_timeout_s
        verdicts = self._inbox.call(self._verifier.counters.remote())
        progress = self._workers.progress(time.monotonic() + limit)
        flow, committed = self._answers.get(self._flow.counters.remote(), "the flow")
        self._answers.wait(lambda: verdicts.done or self._services.away("verifier") or self._failure is not None, limit)
        if verdicts.future is not None and verdicts.future.exception() is None:  # else those known stand
            self._verdicts.seen(verdicts.future.result())
        parts = [_newest(progress.get(owner), committed.get(owner)) for owner in progress.keys() | committed.keys()]
        return FlowStats(
            generated_tokens=sum(part.generated_tokens for part in parts),
            generation_wait_s=sum(part.generation_wait_s for part in parts),
            workers=self._launcher.rollout_workers,
            flow=flow,
            verifier=self._verdicts.total(),
            verdict_wait_s=sum(part.verdict_wait_s for part in parts),
            restarts=self._workers.restarts | self._services.restarts,
        )

    def save(self, folder: Path) -> None:
        if self._broadcasts is not None:
            self._broadcasts.check()
        folder = folder.absolute()
        saved = [self._inbox.call(rank.save.remote(folder)) for rank in self._learner]
        # First the workers, then the flow: a ticket that is committed in between is whole in the flow's state.
        carried = self._workers.partial_groups(time.monotonic() + self._launcher.engine_timeout_s)
        self._answers.get(self._flow.save.remote(folder, carried), "the flow to save its checkpoint")
        self._answers.results(saved, "the learner to save its checkpoint")

    def load(self, folder: Path) -> None:
        folder = folder.absolute()
        self._answers.all([rank.load.remote(folder) for rank in self._learner], "the learner to load its checkpoint")
        self._version = self._answers.get(self._flow.load.remote(folder), "the flow to load its checkpoint")
        self._hand(self._version, weights_changed=True)

    def shutdown(self, logs: Path | None = None) -> None:
        if not ray.is_initialized():
            return
        if not self._local:
            self._actors.kill()
        ray.shutdown()
        if logs is not None and self._logs is not None:
            keep_logs(self._logs, logs)

    def _spawn(self, index: int, owner: str) -> Any:
        """The process of a rollout worker."""
        return self._actors.rollout(index, owner, self._flow, self._verifier)

    def _wait_for_start(self, deadline: float) -> None:
        learner = {f"learner's rank {rank}" if rank else "learner": actor for rank, actor in enumerate(self._learner)}
        services = {"flow": (self._flow, False), "verifier": (self._verifier, True)}
        services |= {name: (actor, False) for name, actor in learner.items()}
        services |= {"evaluator": (self._evaluator, True)}
        calls = {
            name: self._inbox.call(actor.ping.remote()) for name, (actor, _) in services.items() if name not in learner
        }
        # Where its ranks meet before they build together; learner=torch makes nothing of it.
        meeting = calls["learner"] = self._inbox.call(self._learner[0].meeting_point.remote())

        def missing() -> list[str]:
            return [name for name, call in calls.items() if not call.done] + self._workers.starting()

        def failed() -> bool:
            pings = (call.future for call in calls.values())
            return self._failure is not None or any(ping is not None and ping.exception() for ping in pings)

        logs = "Ray's logs on its nodes" if self._logs is None else str(self._logs)  # there is no run folder yet
        in_time = self._inbox.wait(lambda: meeting.done or failed(), deadline)
        if meeting.future is not None and not failed():
            point = meeting.future.result()
            calls |= {name: self._inbox.call(rank.build.remote(point)) for name, rank in learner.items()}
            in_time = self._inbox.wait(lambda: not missing() or failed(), deadline)
        try:
            for name, call in calls.items():
                if call.future is not None:
                    answer(call.future, f"the {name}", logs)
            if self._failure is not None:
                raise self._failure
        except StageDiedError as error:
            if logs in str(error):
                raise
            raise StageDiedError(f"{error}; its log is in {logs}") from error
        if not in_time:
            limit, who = self._launcher.start_timeout_s, ", ".join(missing())
            raise StageTimeoutError(
                f"the run waited {limit:g} s for these to start and gave up: {who}; "
                "raise launcher.start_timeout_s, or give the Ray cluster more"
            )
        for name, (actor, restartable) in services.items():
            self._services.watch(name, actor, restartable)

    def _hand(self, version: int, weights_changed: bool) -> None:
        """Gives the rollout workers a version; the learner confirms that its weights are there."""
        weights: tuple[Any, ...] | None = None
        if weights_changed:
            copied, weights = zip(*(rank.weights.remote() for rank in self._learner), strict=True)
            self._answers.all(copied, "the learner to hand over its weights")
        self._workers.hand(version, None if weights is None else lambda: weights)

    def _fail(self, error: BaseException) -> None:
        """The run ends with the first failure, once a wait for a batch sees it: what is being learned is finished."""
        self._failure = self._failure or error

    def _last_batch(self, failure: BaseException) -> TakenBatch:
        """Ends a wait with a failure, and the question for a batch too: a batch that came later were in no checkpoint.

        If it comes just now, the batch is still trained and the next ``take`` raises.
        """
        batch = None
        with suppress(RunError):  # the flow may be what failed
            batch = self.stop_taking()
        if batch is None:
            raise failure
        return batch

    def _taken(self) -> TakenBatch | None:
        assert self._take is not None
        taken = self._answers.result(self._take, "the flow")
        self._take = None
        return None if taken is None else TakenBatch(*taken)


def _engine_ranks(config: Config) -> int:
    """Processes of one engine that weights are broadcast to; 0 where they go through Ray's object store."""
    engine = config.engine
    if not isinstance(engine, VLLMEngineConfig) or engine.weight_transport is not WeightTransport.broadcast:
        return 0
    return engine.tensor_parallel_size


def _newest(*known: Progress | None) -> Progress:
    """Counters never fall."""
    return max((progress for progress in known if progress is not None), key=lambda p: p.generated_tokens)
