"""Every stage in a Ray actor of its own: generation goes on while the learner learns."""

import shutil
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from vapo_async.build import BaseModel, engine_seed
from vapo_async.config import Config, ConfigError, RayLauncherConfig, RunError
from vapo_async.interrupts import Stop
from vapo_async.launcher.ray_actors import EvaluatorActor, FlowActor, LearnerActor, RolloutActor, VerifierActor
from vapo_async.launcher.ray_cluster import Resources, check_resources, start_ray
from vapo_async.learner.learner import UpdateResult
from vapo_async.stages import EvaluationResult, FlowStats, StageDiedError, StageTimeoutError, TakenBatch

_ASK_STOP_S = 0.5
"""How often a wait looks whether it is to stop."""


class RayStages:
    """See :class:`vapo_async.stages.Stages`. Every wait ends by a limit of ``launcher``'s."""

    def __init__(self, config: Config, launcher: RayLauncherConfig, base: BaseModel) -> None:
        self._config, self._launcher = config, launcher
        self._actors: dict[str, Any] = {}
        learner = Resources.of(config.learner.threads, config.learner.device, launcher)
        rollout = Resources.of(launcher.threads_per_worker, config.engine.device, launcher)
        evaluator = Resources.of(0, config.engine.device, launcher)
        needed = [learner, evaluator, *[rollout] * launcher.rollout_workers]
        self._local = start_ray(launcher, cpus=sum(r.num_cpus for r in needed))
        self._logs = _local_logs() if self._local else None
        try:
            check_resources(needed)
            self._flow = self._start("flow", FlowActor, Resources(), config, base)
            self._verifier = self._start("verifier", VerifierActor, Resources(), config, max_concurrency=4)
            self._learner = self._start("learner", LearnerActor, learner, config, base)
            self._evaluator = self._start("evaluator", EvaluatorActor, evaluator, config, base, self._verifier)
            threads = launcher.threads_per_worker
            parts = (self._flow, self._verifier)
            self._workers = [
                self._start(
                    f"rollout worker {i}", RolloutActor, rollout, config, base, i, threads, *parts, max_concurrency=4
                )
                for i in range(launcher.rollout_workers)
            ]
            deadline = time.monotonic() + launcher.start_timeout_s
            for name, actor in self._actors.items():
                self._get(actor.ping.remote(), f"the {name} to start", max(0.0, deadline - time.monotonic()))
        except BaseException:
            self.shutdown()
            raise
        self._runs: dict[Any, str] = {}  # the generation loops, started with the first take
        self._take: Any = None
        self._evaluations: list[tuple[Any, float]] = []  # with the time by which they have to end
        self._version = 0

    def take(self, stop: Stop) -> TakenBatch | None:
        if not self._runs:
            self._runs = {w.run.remote(): f"rollout worker {i}" for i, w in enumerate(self._workers)}
        if self._take is None:
            self._take = self._flow.take.remote()
        limit = self._launcher.stage_timeout_s
        deadline = time.monotonic() + limit
        while not self._take_ended():
            if stop():
                return self.stop_taking()
            if time.monotonic() > deadline:
                why = self._get(self._flow.why_waiting.remote(), "the flow", 10)
                raise StageTimeoutError(
                    f"the learner waited {limit:.0f} s for a batch: {why}; "
                    "raise launcher.stage_timeout_s if the work is that slow"
                )
        return self._taken()

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
        tensors = self._learner.weights.remote() if step else None
        deadline = time.monotonic() + self._launcher.evaluation_timeout_s
        self._evaluations.append((self._evaluator.evaluate.remote(step, tensors), deadline))

    @property
    def evaluations_running(self) -> int:
        return len(self._evaluations)

    def finished_evaluations(self, stop: Stop) -> list[EvaluationResult]:
        finished: list[EvaluationResult] = []
        while self._evaluations:
            reference, deadline = self._evaluations[0]
            if ray.wait([reference], timeout=0 if stop() else _ASK_STOP_S)[0]:
                self._evaluations.pop(0)
                finished.append(self._get(reference, "the evaluator"))
            elif time.monotonic() > deadline:
                self._evaluations.pop(0)
                limit = self._launcher.evaluation_timeout_s
                raise StageTimeoutError(
                    f"an evaluation took longer than launcher.evaluation_timeout_s={limit:.0f}: "
                    "raise it, or lower evaluation.problems or evaluation.samples"
                )
            elif stop():
                break
        return finished

    def stop_taking(self) -> TakenBatch | None:
        self._get(self._flow.close.remote(), "the flow")
        if self._take is None:
            return None
        return self._taken()  # a closed flow answers at once

    def stats(self) -> FlowStats:
        per_worker = [self._get(w.stats.remote(), f"rollout worker {i}") for i, w in enumerate(self._workers)]
        return FlowStats(
            generated_tokens=sum(tokens for tokens, _ in per_worker),
            generation_wait_s=sum(wait_s for _, wait_s in per_worker),
            workers=len(per_worker),
            flow=self._get(self._flow.counters.remote(), "the flow"),
            verifier=self._get(self._verifier.counters.remote(), "the verifier"),
        )

    def save(self, folder: Path) -> None:
        folder = folder.absolute()
        saves = {"the learner": self._learner.save.remote(folder), "the flow": self._flow.save.remote(folder)}
        for whom, reference in saves.items():
            self._get(reference, f"{whom} to save its checkpoint")

    def load(self, folder: Path) -> None:
        folder = folder.absolute()
        self._get(self._learner.load.remote(folder), "the learner to load its checkpoint")
        self._version = self._get(self._flow.load.remote(folder), "the flow to load its checkpoint")
        tensors = self._learner.weights.remote()
        for i, worker in enumerate(self._workers):
            seed = engine_seed(self._config, i, self._version)
            self._get(worker.resume.remote(self._version, tensors, seed), f"rollout worker {i} to take the weights")

    def shutdown(self, logs: Path | None = None) -> None:
        if not ray.is_initialized():
            return
        if not self._local:
            for actor in self._actors.values():
                ray.kill(actor)
        ray.shutdown()
        if logs is not None and self._logs is not None:
            _keep_logs(self._logs, logs)

    def _start(
        self, name: str, stage: type[Any], resources: Resources, *parts: Any, max_concurrency: int | None = None
    ) -> Any:
        """Starts the actor of one stage; Ray counts ``resources`` against what the cluster has."""
        options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
        if max_concurrency is not None:
            options["max_concurrency"] = max_concurrency
        self._actors[name] = ray.remote(**options)(stage).remote(*parts)
        return self._actors[name]

    def _take_ended(self) -> bool:
        """Waits a moment for the pending take, or for a generation loop that ends before it should."""
        done, _ = ray.wait([self._take, *self._runs], timeout=_ASK_STOP_S)
        if self._take in done:
            return True
        for reference in done:
            self._get(reference, self._runs[reference])
            del self._runs[reference]  # it ended because the flow is closed
        return False

    def _taken(self) -> TakenBatch | None:
        taken, self._take = self._get(self._take, "the flow"), None
        return None if taken is None else TakenBatch(*taken)

    def _get(self, reference: Any, whom: str, timeout_s: float | None = None) -> Any:
        """``ray.get`` with the limit and with errors that name whom was waited for."""
        limit = self._launcher.stage_timeout_s if timeout_s is None else timeout_s
        try:
            return ray.get(reference, timeout=limit)
        except GetTimeoutError as error:
            raise StageTimeoutError(f"the run waited {limit:.0f} s for {whom} and gave up") from error
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError | RunError):  # as it was raised: one line, without Ray's trace
                raise error.cause from error
            if isinstance(error.cause, RayActorError):  # a stage that this one talks to
                raise _died(f"{whom}, which waited for a stage", error.cause) from error
            raise error.as_instanceof_cause() from error
        except RayActorError as error:
            raise _died(whom, error) from error


def _died(whom: str, error: RayActorError) -> StageDiedError:
    lines = str(error).strip().splitlines()
    if error.actor_init_failed:
        return StageDiedError(f"{whom} failed: {lines[-1]}")
    return StageDiedError(f"the run waited for {whom}, whose process died ({lines[0]}); see logs/ in the run folder")


def _local_logs() -> Path:
    """Where the local Ray's processes write."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs"


def _keep_logs(source: Path, target: Path) -> None:
    """Copies what the actors wrote: one file each for standard output and error, empty ones left out."""
    target.mkdir(exist_ok=True)
    for path in source.glob("worker-*"):
        if path.stat().st_size:
            shutil.copy(path, target)
