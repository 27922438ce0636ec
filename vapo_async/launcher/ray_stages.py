"""Every stage in a Ray actor of its own: generation goes on while the learner learns."""

import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from vapo_async.build import BaseModel
from vapo_async.config import Config, ConfigError, RayLauncherConfig, RunError
from vapo_async.launcher.ray_actors import EvaluatorActor, FlowActor, LearnerActor, RolloutActor, VerifierActor
from vapo_async.launcher.ray_cluster import start_ray
from vapo_async.learner.learner import UpdateResult
from vapo_async.stages import EvaluationResult, FlowStats, StageDiedError, StageTimeoutError, TakenBatch


def _actor(stage: type[Any], *, num_cpus: int = 0, num_gpus: float = 0, max_concurrency: int | None = None) -> Any:
    """The class as an actor class; Ray counts ``num_cpus`` and ``num_gpus`` against what the cluster has."""
    options: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if max_concurrency is not None:
        options["max_concurrency"] = max_concurrency
    return ray.remote(**options)(stage)


class RayStages:
    """See :class:`vapo_async.stages.Stages`. Every wait ends by ``launcher.stage_timeout_s``."""

    def __init__(self, config: Config, launcher: RayLauncherConfig, base: BaseModel) -> None:
        self._config, self._launcher = config, launcher
        workers = launcher.rollout_workers
        self._local = start_ray(launcher, cpus=workers * launcher.threads_per_worker + config.learner.threads)
        try:
            self._flow = _actor(FlowActor).remote(config, base)
            self._verifier = _actor(VerifierActor).remote(config)
            gpus = 0.0 if config.learner.device == "cpu" else launcher.gpus_per_actor
            learner = _actor(LearnerActor, num_cpus=config.learner.threads, num_gpus=gpus)
            self._learner = learner.remote(config, base)
            gpus = 0.0 if config.engine.device == "cpu" else launcher.gpus_per_actor
            self._evaluator = _actor(EvaluatorActor, num_gpus=gpus).remote(config, base, self._verifier)
            threads = launcher.threads_per_worker
            rollout = _actor(RolloutActor, num_cpus=threads, num_gpus=gpus, max_concurrency=4)
            self._workers = [
                rollout.remote(config, base, i, threads, self._flow, self._verifier) for i in range(workers)
            ]
            named = {"flow": self._flow, "verifier": self._verifier, "learner": self._learner}
            named |= {"evaluator": self._evaluator} | {f"rollout worker {i}": w for i, w in enumerate(self._workers)}
            for name, actor in named.items():
                self._get(actor.ping.remote(), f"the {name} to start", launcher.start_timeout_s)
        except BaseException:
            self.shutdown()
            raise
        self._runs: list[Any] = []  # the generation loops, started with the first take
        self._take: Any = None
        self._evaluations: list[Any] = []
        self._version = 0

    def take(self) -> TakenBatch | None:
        if not self._runs:
            self._runs = [worker.run.remote() for worker in self._workers]
        if self._take is None:
            self._take = self._flow.take.remote()
        return self._finish_take()

    def learn(self, batch: TakenBatch) -> UpdateResult:
        result: UpdateResult = self._get(self._learner.update.remote(batch.handle, batch.version), "the learner")
        return result

    def publish(self, policy_changed: bool) -> int:
        version = self._version + 1
        tensors = self._learner.weights.remote() if policy_changed else None
        for i, reference in enumerate([worker.publish.remote(version, tensors) for worker in self._workers]):
            self._get(reference, f"rollout worker {i} to take the weights of version {version}")
        self._version = self._get(self._flow.publish.remote(), "the flow")
        return self._version

    def start_evaluation(self, step: int) -> None:
        self._evaluations.append(self._evaluator.evaluate.remote(step, self._learner.weights.remote()))

    def finished_evaluations(self, wait: bool) -> list[EvaluationResult]:
        finished: list[EvaluationResult] = []
        while self._evaluations:
            if not wait and not ray.wait(self._evaluations[:1], timeout=0)[0]:
                break
            finished.append(self._get(self._evaluations[0], "the evaluator"))
            self._evaluations.pop(0)
        return finished

    def stop_taking(self) -> TakenBatch | None:
        self._get(self._flow.close.remote(), "the flow")
        return None if self._take is None else self._finish_take()

    def stats(self) -> FlowStats:
        per_worker = [self._get(worker.stats.remote(), "a rollout worker") for worker in self._workers]
        return FlowStats(
            generated_tokens=sum(tokens for tokens, _ in per_worker),
            generation_wait_s=sum(wait_s for _, wait_s in per_worker),
            workers=len(per_worker),
            tickets=self._get(self._flow.ticket_counts.remote(), "the flow"),
            verifier=self._get(self._verifier.counters.remote(), "the verifier"),
        )

    def save(self, folder: Path) -> None:
        folder = folder.absolute()
        saves = [self._learner.save.remote(folder), self._flow.save.remote(folder)]
        for reference in saves:
            self._get(reference, "the checkpoint")

    def load(self, folder: Path) -> None:
        folder = folder.absolute()
        self._get(self._learner.load.remote(folder), "the learner to load its checkpoint")
        self._version = self._get(self._flow.load.remote(folder), "the flow to load its checkpoint")
        tensors = self._learner.weights.remote()
        for worker in self._workers:
            self._get(worker.publish.remote(self._version, tensors), "a rollout worker")

    def shutdown(self) -> None:
        if self._local and ray.is_initialized():
            ray.shutdown()
        elif ray.is_initialized():
            for actor in [self._flow, self._verifier, self._learner, self._evaluator, *self._workers]:
                ray.kill(actor)
            ray.shutdown()

    def _finish_take(self) -> TakenBatch | None:
        """Waits for the pending take, or for a generation loop that ends before it should."""
        deadline = time.monotonic() + self._launcher.stage_timeout_s
        while True:
            left = deadline - time.monotonic()
            done, _ = ray.wait([self._take, *self._runs], timeout=max(left, 0.0))
            if self._take in done:
                taken = self._get(self._take, "the flow")
                self._take = None
                return None if taken is None else TakenBatch(taken[2], taken[0], taken[1])
            if not done:
                why = ray.get(self._flow.why_waiting.remote(), timeout=10)
                raise StageTimeoutError(
                    f"the learner waited {self._launcher.stage_timeout_s:.0f} s for a batch: {why}; "
                    "raise launcher.stage_timeout_s if the work is that slow"
                )
            for reference in done:
                self._get(reference, f"rollout worker {self._runs.index(reference)}")
                self._runs.remove(reference)  # it ended because the flow is closed

    def _get(self, reference: Any, whom: str, timeout_s: float | None = None) -> Any:
        """``ray.get`` with the limit and with errors that name whom was waited for."""
        limit = self._launcher.stage_timeout_s if timeout_s is None else timeout_s
        try:
            return ray.get(reference, timeout=limit)
        except ray.exceptions.GetTimeoutError as error:
            raise StageTimeoutError(f"the run waited {limit:.0f} s for {whom} and gave up") from error
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError | RunError):  # as it was raised: one line, without Ray's trace
                raise error.cause from error
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            lines = str(error).strip().splitlines()
            if error.actor_init_failed:
                raise StageDiedError(f"{whom} failed: {lines[-1]}") from error
            raise StageDiedError(f"{whom}: the process died ({lines[0]})") from error
