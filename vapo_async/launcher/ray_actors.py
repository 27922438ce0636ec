"""What runs inside each Ray actor. Each builds its own part; object references carry groups and weights between them.

The waiting is here: the flow actor lets callers wait on a condition, the rollout worker waits on its inbox.
"""

import asyncio
import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from tensordict import TensorDictBase
from torch import Tensor

from vapo_async.buffer import Batch
from vapo_async.build import (
    BaseModel,
    build_collector,
    build_evaluator,
    build_flow,
    build_heldout,
    build_learner,
    build_verifier,
)
from vapo_async.collector.collector import FinishedGroup
from vapo_async.config import Config
from vapo_async.flow import Assignment, FlowCounters
from vapo_async.launcher.inline import FLOW_FILE
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import UpdateResult
from vapo_async.models.load import load_tokenizer
from vapo_async.prompts.tasks import build_task
from vapo_async.schema import Score
from vapo_async.stages import EvaluationResult, evaluate, score_requests, verifier_counters, write_scores
from vapo_async.verifier.scoring import ScoreRequest
from vapo_async.weights.mailbox import Mailbox, published_tensors


class FlowActor:
    """The flow behind a condition: one event loop, so its methods never interleave inside a state change."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        self._flow = build_flow(config, base)
        self._changed = asyncio.Condition()

    async def ping(self) -> None:
        """Returns once the actor is up."""

    async def admit(self, most: int) -> list[Assignment]:
        """Waits until at least one ticket can be given; [] once the flow is closed."""
        async with self._changed:
            while not (assignments := self._flow.admit(most)) and not self._flow.closed:
                await self._changed.wait()
            return assignments

    async def commit(self, ticket_id: int, group: TensorDictBase) -> None:
        """Wakes who waits for a batch and, as the group may be refused, who waits for a ticket."""
        async with self._changed:
            self._flow.commit(ticket_id, group)
            self._changed.notify_all()

    async def take(self) -> tuple[Any, list[int], int, list[int], list[int]] | None:
        """Waits for a batch: a reference to its trajectories, then the rest of a ``TakenBatch``. None once closed.

        Raises ``RunError`` when dynamic sampling runs out of patience.
        """
        async with self._changed:
            batch: Batch | None
            while (batch := self._flow.take()) is None:
                if self._flow.closed:
                    return None
                await self._changed.wait()
            handle = ray.put(list(batch.groups.unbind(0)))
            return handle, batch.ages, batch.version, batch.tickets, batch.group_ids

    async def publish(self) -> int:
        async with self._changed:
            version = self._flow.publish()
            self._changed.notify_all()
            return version

    async def close(self) -> None:
        async with self._changed:
            self._flow.close()
            self._changed.notify_all()

    async def why_waiting(self) -> str:
        return self._flow.why_waiting()

    async def counters(self) -> FlowCounters:
        return self._flow.counters()

    async def save(self, folder: Path) -> None:
        (folder / FLOW_FILE).write_text(json.dumps(self._flow.state_dict(), indent=1))

    async def load(self, folder: Path) -> int:
        """Returns the restored version."""
        self._flow.load_state_dict(json.loads((folder / FLOW_FILE).read_text()))
        return self._flow.published


class VerifierActor:
    """Judges answers in its own worker processes."""

    def __init__(self, config: Config) -> None:
        self._verifier = build_verifier(config)

    def ping(self) -> None:
        """Returns once the actor is up."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self._verifier.score(requests)

    def counters(self) -> dict[str, int]:
        return verifier_counters(self._verifier)


class RolloutActor:
    """Generates without ever waiting for a message while it has responses in flight.

    ``run`` is the generation loop in one thread; other calls and the answers to its own requests reach it through an
    inbox and, for weights, a mailbox that it looks into before every decode step.
    """

    def __init__(self, config: Config, base: BaseModel, worker: int, threads: int, flow: Any, verifier: Any) -> None:
        torch.set_num_threads(threads)
        self._collector = build_collector(config, base, worker)
        self._flow, self._verifier = flow, verifier
        self._group_size = config.algorithm.group_size
        self._mailbox = Mailbox()
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stats_lock = threading.Lock()
        self._wait_s = 0.0

    def ping(self) -> None:
        """Returns once the actor is up."""

    def publish(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Weights for the next decode step."""
        self._mailbox.publish(version, tensors)
        self._inbox.put(("wake", None))

    def resume(self, version: int, tensors: Mapping[str, Tensor], seed: int) -> None:
        """Before ``run``: weights and a sampling stream of a resumed run."""
        self._collector.seed(seed)
        self._mailbox.publish(version, tensors)

    def stats(self) -> tuple[int, float]:
        """Tokens generated; seconds without anything to generate."""
        with self._stats_lock:
            return self._collector.generated_tokens, self._wait_s

    def run(self) -> None:
        """Generates until the flow is closed. Raises what a stage that it talks to raised."""
        asked = False
        while True:
            free = self._collector.capacity - self._collector.unfinished_responses
            if not asked and free > 0:
                most = -(-free // self._group_size)  # the rest is for other workers
                self._request(("assignments", None), self._flow.admit.remote(most))
                asked = True
            while (message := self._next_message()) is not None:
                kind, payload = message
                if kind == "assignments":
                    if not payload:
                        return  # closed
                    asked = False
                    self._pull_weights()
                    for assignment in payload:
                        self._collector.start(assignment.ticket, assignment.prompt)
                elif kind == "scores":
                    finished, scores = payload
                    write_scores(finished, scores)
                    self._request(
                        ("committed", None), self._flow.commit.remote(finished.ticket.ticket_id, finished.group)
                    )
                elif kind == "failed":
                    raise payload
            self._pull_weights()
            for finished in self._collector.step():
                self._request(("scores", finished), self._verifier.score.remote(score_requests(finished)))

    def _next_message(self) -> tuple[str, Any] | None:
        """The next message; waits for one only when there is nothing to generate."""
        if self._collector.busy:
            try:
                return self._inbox.get_nowait()
            except queue.Empty:
                return None
        start = time.perf_counter()
        message = self._inbox.get()
        with self._stats_lock:
            self._wait_s += time.perf_counter() - start
        return message

    def _request(self, answer_as: tuple[str, FinishedGroup | None], reference: Any) -> None:
        """Puts the answer into the inbox when it comes; an error as a ``failed`` message."""
        kind, context = answer_as

        def deliver(future: Any) -> None:
            error = future.exception()
            if error is not None:
                self._inbox.put(("failed", error))
            else:
                result = future.result()
                self._inbox.put((kind, result if context is None else (context, result)))

        reference.future().add_done_callback(deliver)

    def _pull_weights(self) -> None:
        publication = self._mailbox.pull()
        if publication is not None:
            self._collector.load_weights(*publication)


class LearnerActor:
    """Policy, critic and their optimizers."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        torch.set_num_threads(config.learner.threads)
        self._tokenizer = load_tokenizer(base.tokenizer)
        self._learner = build_learner(config, base)

    def ping(self) -> None:
        """Returns once the actor is up."""

    def update(self, trajectories: list[TensorDictBase], version: int) -> UpdateResult:
        return self._learner.update(trajectories, version)

    def weights(self) -> dict[str, Tensor]:
        return published_tensors(self._learner.policy)

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


class EvaluatorActor:
    """Held-out evaluation with an engine of its own, beside training."""

    def __init__(self, config: Config, base: BaseModel, verifier: Any) -> None:
        torch.set_num_threads(1)
        self._config = config
        self._evaluator = build_evaluator(config, base)
        task = build_task(config.task, config.seed)
        tokenizer = load_tokenizer(base.tokenizer)
        self._heldout = build_heldout(config, task, tokenizer, config.evaluation.problems)
        self._verifier = _RemoteScorer(verifier)

    def ping(self) -> None:
        """Returns once the actor is up."""

    def evaluate(self, step: int, tensors: Mapping[str, Tensor] | None) -> EvaluationResult:
        """``tensors=None``: the base, which the engine starts with."""
        if tensors is not None:
            self._evaluator.load_weights(step, tensors)
        samples = self._config.evaluation.samples
        return evaluate(self._evaluator, self._verifier, self._heldout, step=step, samples=samples)
