"""What runs inside the actors of verifier and evaluator. Each builds its own part.

``alive`` has a thread of its own in every one of them: who called it learns of the actor's death at once.
"""

import os
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import ray
import torch

from vapo_async.build import BaseModel, build_evaluator, build_heldout, build_verifier
from vapo_async.collector.engine import EngineDiedError
from vapo_async.config import Config
from vapo_async.models.load import load_tokenizer
from vapo_async.prompts.tasks import build_task
from vapo_async.schema import Score
from vapo_async.stages import EvaluationResult, evaluate, verifier_counters
from vapo_async.verifier.scoring import ScoreRequest
from vapo_async.weights.travel import Arrays, to_tensors

WATCH = "watch"
"""Concurrency group of ``alive``."""
LOOK = "look"
"""Concurrency group of calls that do not stand behind others."""
GROUPS = {WATCH: 1, LOOK: 1}


class Watched:
    """Base of an actor whose death somebody waits for."""

    def ping(self) -> None:
        """Returns once the actor is up."""

    @ray.method(concurrency_group=WATCH)
    def alive(self) -> None:
        """Does not return."""
        threading.Event().wait()


class VerifierActor(Watched):
    """Judges answers in its own worker processes. Without a state: a call can be repeated in another process."""

    def __init__(self, config: Config) -> None:
        self._verifier = build_verifier(config)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self._verifier.score(requests)

    @ray.method(concurrency_group=LOOK)
    def counters(self) -> dict[str, int]:
        return verifier_counters(self._verifier)


class _RemoteScorer:
    """The verifier actor as :func:`vapo_async.stages.evaluate` wants it."""

    def __init__(self, verifier: Any) -> None:
        self._verifier = verifier

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores: list[Score] = ray.get(self._verifier.score.remote(requests))
        return scores


class EvaluatorActor(Watched):
    """Held-out evaluation with an engine of its own, beside training. A call can be repeated in another process."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        torch.set_num_threads(1)
        self._config = config
        self._evaluator = build_evaluator(config, base)
        task = build_task(config.task, config.seed)
        tokenizer = load_tokenizer(base.tokenizer)
        self._heldout = build_heldout(config, task, tokenizer, config.evaluation.problems)

    def evaluate(self, step: int, verifier: Any, *shares: Arrays) -> EvaluationResult:
        """``shares``: of the weights, one of each rank of the learner; none: the base, which the engine starts with."""
        samples = self._config.evaluation.samples
        try:
            if shares:
                self._evaluator.load_weights(step, to_tensors(*shares))
            return evaluate(self._evaluator, _RemoteScorer(verifier), self._heldout, step=step, samples=samples)
        except EngineDiedError:
            traceback.print_exc()
            os._exit(1)  # with it: Ray starts another process, which has an engine, and repeats the call there
