"""Held-out evaluations on their way: what came of them, and an evaluator that begins anew when one is overdue."""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from safetensors import SafetensorError

from vapo_async.config import RayLauncherConfig, RunError
from vapo_async.interrupts import Stop
from vapo_async.launcher.ray_calls import answer, reason
from vapo_async.launcher.ray_inbox import Call, Inbox
from vapo_async.stages import EvaluationResult, StageTimeoutError


@dataclass(frozen=True)
class _Evaluation:
    """One that was asked for; ``deadline`` is when it has to have ended, ``time.monotonic``."""

    reference: Any
    call: Call
    deadline: float


class Evaluations:
    """In the order of their start; see :class:`vapo_async.stages.Stages`.

    Args:
        inbox: what the driver waits on.
        launcher: the limit, ``evaluation_timeout_s``.
        evaluator: the evaluator's actor.
        verifier: the verifier's actor, whom the evaluator asks.
        logs: where a dead process may have left its reason.
    """

    def __init__(self, inbox: Inbox, launcher: RayLauncherConfig, evaluator: Any, verifier: Any, logs: str) -> None:
        self._inbox, self._launcher, self._logs = inbox, launcher, logs
        self._evaluator, self._verifier = evaluator, verifier
        self._started: list[_Evaluation] = []

    def start(self, step: int, tensors: Any | None) -> None:
        """``tensors``: a reference to the policy; None for the base."""
        reference = self._evaluator.evaluate.remote(step, tensors, self._verifier)
        deadline = time.monotonic() + self._launcher.evaluation_timeout_s
        self._started.append(_Evaluation(reference, self._inbox.call(reference), deadline))

    @property
    def running(self) -> int:
        return len(self._started)

    def finished(self, stop: Stop) -> list[EvaluationResult]:
        """Those that ended; waits for the others until ``stop``, or until the oldest is overdue.

        Raises:
            RunError: the oldest one failed, or is overdue; it is not running any more.
        """
        stop.on_request(self._inbox.wake)
        finished: list[EvaluationResult] = []
        while self._started:
            evaluation = self._started[0]
            call = evaluation.call
            self._inbox.wait(lambda: call.done or stop(), evaluation.deadline)  # noqa: B023 (called here only)
            if call.future is None and time.monotonic() < evaluation.deadline:
                break
            if finished and (call.future is None or call.future.exception() is not None):
                break  # the next call tells of it: an error would take the place of what is finished
            self._started.pop(0)
            finished.append(self._result(evaluation))
        return finished

    def _result(self, evaluation: _Evaluation) -> EvaluationResult:
        """Of one that has ended. One that is overdue ends here: the evaluator begins anew, without it."""
        if evaluation.call.future is None:
            ray.cancel(evaluation.reference)  # otherwise Ray repeats it
            ray.kill(self._evaluator, no_restart=False)
            limit = self._launcher.evaluation_timeout_s
            raise StageTimeoutError(
                f"an evaluation took longer than launcher.evaluation_timeout_s={limit:g}: "
                "raise it, or lower evaluation.problems or evaluation.samples"
            )
        try:
            result: EvaluationResult = answer(evaluation.call.future, "the evaluator", self._logs)
        except (RayError, OSError, SafetensorError) as error:
            raise RunError(f"the evaluator: {reason(error)}") from error
        return result
