"""What runs inside the other actors: verifier, learner, evaluator. Each builds its own part.

``alive`` has a thread of its own in every one of them: who called it learns of the actor's death at once.
"""

import os
import socket
import threading
import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
import torch
from tensordict import TensorDictBase

from vapo_async.build import BaseModel, build_evaluator, build_heldout, build_learner, build_verifier
from vapo_async.collector.engine import EngineDiedError
from vapo_async.config import Config, RunError
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import UpdateResult
from vapo_async.models.load import load_tokenizer
from vapo_async.prompts.tasks import build_task
from vapo_async.schema import Score
from vapo_async.stages import EvaluationResult, evaluate, verifier_counters
from vapo_async.verifier.scoring import ScoreRequest
from vapo_async.weights.broadcast import Group, Layout
from vapo_async.weights.mailbox import published_tensors
from vapo_async.weights.sender import Sender, build_sender
from vapo_async.weights.travel import Arrays, to_arrays, to_tensors

WATCH = "watch"
"""Concurrency group of ``alive``."""
LOOK = "look"
"""Concurrency group of calls that do not stand behind others."""
SEND = "send"
"""Concurrency group of the learner's broadcasts, which may hang."""
GROUPS = {WATCH: 1, LOOK: 1}
LEARNER_GROUPS = GROUPS | {SEND: 1}


class _Watched:
    """Base of an actor whose death somebody waits for."""

    def ping(self) -> None:
        """Returns once the actor is up."""

    @ray.method(concurrency_group=WATCH)
    def alive(self) -> None:
        """Does not return."""
        threading.Event().wait()


class VerifierActor(_Watched):
    """Judges answers in its own worker processes. Without a state: a call can be repeated in another process."""

    def __init__(self, config: Config) -> None:
        self._verifier = build_verifier(config)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self._verifier.score(requests)

    @ray.method(concurrency_group=LOOK)
    def counters(self) -> dict[str, int]:
        return verifier_counters(self._verifier)


class LearnerActor(_Watched):
    """Policy, critic and their optimizers."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        torch.set_num_threads(config.learner.threads)
        self._tokenizer = load_tokenizer(base.tokenizer)
        self._learner = build_learner(config, base)
        self._sender: Sender | None = None
        self._sent: Arrays | None = None

    def update(self, trajectories: list[TensorDictBase], version: int) -> UpdateResult:
        return self._learner.update(trajectories, version)

    @ray.method(num_returns=2)
    def weights(self) -> tuple[None, Arrays]:
        """Two references: the first one says that the second one is there, without fetching it."""
        return None, to_arrays(published_tensors(self._learner.policy))

    def layout(self) -> Layout:
        """What a broadcast sends."""
        return Layout.of(self._learner.policy)

    def meeting_point(self) -> tuple[str, int]:
        """Where a group of engines can meet the learner."""
        host = ray.util.get_node_ip_address()
        with closing(socket.socket()) as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    @ray.method(concurrency_group=SEND)
    def broadcast(self, group: Group | None, anew: bool) -> None:
        """Sends the weights to the engines of a group, which is joined first if it is a new one.

        A copy is kept for those that come later, with which the next update does not interfere.

        Raises:
            RunError: somebody left, or did not come.
        """
        self._sent = to_arrays(published_tensors(self._learner.policy))
        if group is None:
            return
        if self._sender is None:
            self._sender = build_sender(self._learner.policy)
        try:
            if anew:
                self._sender.join(group)
            self._sender.send()
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise RunError(f"the learner's broadcast to {', '.join(group.owners)} failed: {first}") from error

    @ray.method(concurrency_group=LOOK)
    def sent(self) -> Arrays:
        """What the last broadcast sent."""
        assert self._sent is not None
        return self._sent

    def save(self, folder: Path) -> None:
        save_learner(self._learner, self._tokenizer, folder)

    def load(self, folder: Path) -> None:
        load_learner(self._learner, folder)


class _RemoteScorer:
    """The verifier actor as :func:`vapo_async.stages.evaluate` wants it."""

    def __init__(self, verifier: Any) -> None:
        self._verifier = verifier

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores: list[Score] = ray.get(self._verifier.score.remote(requests))
        return scores


class EvaluatorActor(_Watched):
    """Held-out evaluation with an engine of its own, beside training. A call can be repeated in another process."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        torch.set_num_threads(1)
        self._config = config
        self._evaluator = build_evaluator(config, base)
        task = build_task(config.task, config.seed)
        tokenizer = load_tokenizer(base.tokenizer)
        self._heldout = build_heldout(config, task, tokenizer, config.evaluation.problems)

    def evaluate(self, step: int, weights: Arrays | None, verifier: Any) -> EvaluationResult:
        """``weights=None``: the base, which the engine starts with."""
        samples = self._config.evaluation.samples
        try:
            if weights is not None:
                self._evaluator.load_weights(step, to_tensors(weights))
            return evaluate(self._evaluator, _RemoteScorer(verifier), self._heldout, step=step, samples=samples)
        except EngineDiedError:
            traceback.print_exc()
            os._exit(1)  # with it: Ray starts another process, which has an engine, and repeats the call there
