"""Held-out evaluations on their way: what came of them, and an evaluator that begins anew when one is overdue."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from safetensors import SafetensorError

from vapo_async.config import RayLauncherConfig, RunError
from vapo_async.interrupts import Stop
from vapo_async.launcher.ray_calls import answer, reason
from vapo_async.launcher.ray_inbox import Call, Inbox
from vapo_async.stages import EvaluationResult, StageTimeoutError


@dataclass
class _Evaluation:
    """One that was asked for, or will be once the one before it has ended."""

    step: int
    weights: Sequence[Any]
    reference: Any = None
    """Of the answer; None: not asked for."""
    deadline: float = math.inf
    """When it has to have ended, ``time.monotonic``."""
    call: Call = field(default_factory=Call)


class Evaluations:
    """One after the other, in the order of their start; see :class:`vapo_async.stages.Stages`.

    The evaluator is asked for one at a time: calls that a process leaves behind as it dies Ray repeats in any order.

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

    def start(self, step: int, weights: Sequence[Any]) -> None:
        """``weights``: references to shares of the policy's; none for the base."""
        self._started.append(_Evaluation(step, weights))
        self._ask()

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
            try:
                finished.append(self._result(evaluation))
            finally:
                self._ask()
        return finished

    def _ask(self) -> None:
        """Has the evaluator go on with the next one, unless it is busy."""
        waiting = [evaluation for evaluation in self._started if not evaluation.call.done]
        if not waiting or waiting[0].reference is not None:
            return
        evaluation = waiting[0]
        evaluation.reference = self._evaluator.evaluate.remote(evaluation.step, self._verifier, *evaluation.weights)
        evaluation.deadline = time.monotonic() + self._launcher.evaluation_timeout_s
        self._inbox.watch(evaluation.reference, partial(self._on_answer, evaluation))

    def _on_answer(self, evaluation: _Evaluation, future: Future[Any]) -> None:
        evaluation.call.answered(future)
        self._ask()

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
