"""A rollout worker's process: generates without ever waiting for a message while it has responses in flight."""

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from vapo_async.build import BaseModel, build_collector
from vapo_async.collector.collector import FinishedGroup
from vapo_async.config import Config, ConfigError, RunError
from vapo_async.flow import Assignment
from vapo_async.launcher.ray_flow import Progress
from vapo_async.launcher.ray_watchdog import Watchdog
from vapo_async.schema import (
    FINISH_REASON,
    POLICY_VERSION,
    RESPONSE_MASK,
    SAMPLE_LOG_PROB,
    TOKENS,
    FinishReason,
    Response,
    Score,
)
from vapo_async.stages import StageDiedError, score_requests, write_scores
from vapo_async.weights.broadcast import Broadcast, Group
from vapo_async.weights.mailbox import Mailbox
from vapo_async.weights.travel import Arrays, to_tensors


@dataclass
class _Message:
    """``kind`` says what has come; ``answer`` is filled where somebody waits for it."""

    kind: str
    payload: Any = None
    answer: Future[Any] = field(default_factory=Future)


class RolloutActor:
    """One collector under one owner's name.

    ``run`` is the generation loop in one thread; other calls and the answers to its own requests reach it through an
    inbox and, for weights, a mailbox that it looks into before every decode step.
    """

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        worker: int,
        owner: str,
        threads: int,
        engine_timeout_s: float,
        flow: Any,
        verifier: Any,
    ) -> None:
        torch.set_num_threads(threads)
        self._collector = build_collector(config, base, worker)
        self._owner, self._flow, self._verifier = owner, flow, verifier
        self._group_size = config.algorithm.group_size
        self._watchdog = Watchdog(engine_timeout_s)
        self._mailbox: Mailbox[tuple[Arrays, ...] | Broadcast] = Mailbox()
        self._group: Group | None = None  # of the last broadcast
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running = False  # whether somebody reads the inbox
        self._generation_wait_s = self._verdict_wait_s = 0.0
        self._unconfirmed: dict[int, tuple[FinishedGroup, float]] = {}  # finished at a time, until their commit is done
        self._cancelled: set[int] = set()  # before their assignment was here

    def ping(self) -> None:
        """Returns once the actor is up."""

    def publish(self, version: int, broadcast: Broadcast | None, *shares: Arrays) -> None:
        """Weights for the next decode step, in shares, or the broadcast that brings them; neither: those before."""
        self._mailbox.publish(version, broadcast or shares or None)
        self._inbox.put(_Message("wake"))

    def progress(self) -> Progress:
        return Progress(self._collector.generated_tokens, self._generation_wait_s, self._verdict_wait_s)

    def partial_groups(self) -> dict[int, list[Response]]:
        """By ticket: what there is of every group that is not in the buffer for certain, between two decode steps."""
        message = _Message("partial_groups")
        with self._lock:
            if not self._running:
                return self._partial_groups()
            self._inbox.put(message)
        groups: dict[int, list[Response]] = message.answer.result()
        return groups

    def run(self, seed: int) -> Exception | None:
        """Generates until the flow is closed or takes this worker for lost.

        Returns what a stage that it talks to raised, if one did; raises what the engine does.
        """
        self._watchdog.alive()  # the engine may hang before its first step
        self._collector.seed(seed)
        with self._lock:
            self._running = True
        self._request("cancellations", self._flow.cancellations.remote(self._owner))
        try:
            return self._generate()
        finally:
            self._watchdog.rest()
            self._stop_reading()

    def _generate(self) -> Exception | None:
        asked = False
        while True:
            free = self._collector.capacity - self._collector.unfinished_responses
            if not asked and free > 0:
                most = -(-free // self._group_size)  # the rest is for other workers
                self._request("assignments", self._flow.admit.remote(most, self._owner))
                asked = True
            message = self._next_message()
            if message is None:
                self._step()
                continue
            match message.kind:
                case "assignments":
                    if not message.payload:
                        return None
                    asked = False
                    self._start(message.payload)
                case "scores":
                    self._commit(*message.payload)
                case "committed":
                    del self._unconfirmed[message.payload]
                    self._cancelled.discard(message.payload)
                case "cancellations":
                    if message.payload is None:
                        return None
                    self._cancel(message.payload)
                case "partial_groups":
                    message.answer.set_result(self._partial_groups())
                case "wake":
                    self._pull_weights()  # others may wait for this one to join a broadcast
                case "failed":
                    return _told(message.payload, self._owner)

    def _step(self) -> None:
        self._watchdog.alive()
        self._pull_weights()
        for finished in self._collector.step():
            self._unconfirmed[finished.ticket.ticket_id] = finished, time.perf_counter()
            self._request("scores", self._verifier.score.remote(score_requests(finished)), finished)

    def _start(self, assignments: list[Assignment]) -> None:
        self._pull_weights()
        for assignment in assignments:
            if assignment.ticket.ticket_id in self._cancelled:
                self._cancelled.discard(assignment.ticket.ticket_id)
                self._drop(assignment.ticket.ticket_id, [len(response.token_ids) for response in assignment.carried])
            else:
                self._collector.start(assignment.ticket, assignment.prompt, assignment.carried)

    def _commit(self, finished: FinishedGroup, scores: list[Score]) -> None:
        ticket_id = finished.ticket.ticket_id
        self._verdict_wait_s += time.perf_counter() - self._unconfirmed[ticket_id][1]
        write_scores(finished, scores)
        commit = self._flow.commit.remote(ticket_id, finished.group, self._owner, self.progress())
        self._request("committed", commit, ticket_id)

    def _cancel(self, ticket_ids: list[int]) -> None:
        """A group that is finished goes its way: the flow knows that it comes too late."""
        for ticket_id in ticket_ids:
            if ticket_id in self._collector.tickets:
                self._drop(ticket_id, self._collector.cancel(ticket_id))
            else:
                self._cancelled.add(ticket_id)
        self._request("cancellations", self._flow.cancellations.remote(self._owner))

    def _drop(self, ticket_id: int, lengths: list[int]) -> None:
        self._request("told", self._flow.dropped.remote(ticket_id, lengths))

    def _partial_groups(self) -> dict[int, list[Response]]:
        finished = {ticket_id: _responses(group) for ticket_id, (group, _) in self._unconfirmed.items()}
        return finished | self._collector.partial_groups()

    def _next_message(self) -> _Message | None:
        """The next message; waits for one only when there is nothing to generate."""
        if self._collector.busy:
            try:
                return self._inbox.get_nowait()
            except queue.Empty:
                return None
        self._watchdog.rest()
        start = time.perf_counter()
        message = self._inbox.get()
        self._generation_wait_s += time.perf_counter() - start
        self._watchdog.alive()
        return message

    def _stop_reading(self) -> None:
        """Answers who waits; from now on callers help themselves."""
        with self._lock:
            self._running = False
            while not self._inbox.empty():
                message = self._inbox.get()
                if message.kind == "partial_groups":
                    try:
                        message.answer.set_result(self._partial_groups())
                    except Exception as error:  # noqa: BLE001 (for who asked; ``run`` has a reason of its own)
                        message.answer.set_exception(error)

    def _request(self, kind: str, reference: Any, context: Any = None) -> None:
        """Puts the answer into the inbox when it comes, behind ``context`` or instead of it; an error as ``failed``."""

        def deliver(future: Any) -> None:
            error = future.exception()
            if error is not None:
                self._inbox.put(_Message("failed", error))
            elif kind == "scores":
                self._inbox.put(_Message(kind, (context, future.result())))
            else:
                self._inbox.put(_Message(kind, future.result() if context is None else context))

        reference.future().add_done_callback(deliver)

    def _pull_weights(self) -> None:
        publication = self._mailbox.pull()
        if publication is None:
            return
        version, weights = publication
        if isinstance(weights, Broadcast):
            join = weights.join() if weights.group != self._group else None
            self._collector.receive_weights(version, weights.update(), join)
            self._group = weights.group
        else:
            self._collector.load_weights(version, None if weights is None else to_tensors(*weights))


def _responses(finished: FinishedGroup) -> list[Response]:
    """The responses that a group was made of."""
    return [
        Response(
            i,
            trajectory[TOKENS][trajectory[RESPONSE_MASK]].tolist(),
            trajectory[SAMPLE_LOG_PROB][trajectory[RESPONSE_MASK]].tolist(),
            trajectory[POLICY_VERSION][trajectory[RESPONSE_MASK]].tolist(),
            FinishReason(int(trajectory[FINISH_REASON])),
        )
        for i, trajectory in enumerate(finished.group.unbind(0))
    ]


def _told(error: Exception, owner: str) -> Exception:
    """An error of another stage than ``owner`` in a form that can travel on."""
    if isinstance(error, RayActorError | ObjectLostError):  # Ray's own says no more of whom, and may not be picklable
        return StageDiedError(f"a stage that {owner} talks to died ({str(error).strip().splitlines()[0]})")
    if not isinstance(error, RayTaskError):
        return error
    if isinstance(error.cause, ConfigError | RunError):
        return error.cause
    return RuntimeError(str(error))
