"""One process, one thread of control: a run is a function of its config and seed.

Generation advances inside :meth:`InlineStages.take`, one decode step at a time, until the flow has a batch, and after
:meth:`InlineStages.learn` by as many steps as the schedule says, as if it had gone on meanwhile. Responses that are not
done then stay in flight across the publication. With ``max_staleness`` 0 this is synchronous training.

A checkpoint holds all that the next token depends on: a run that was killed and resumed ends with the weights of one
that was not, bit for bit.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from vapo_async.build import (
    BaseModel,
    build_collector,
    build_evaluator,
    build_flow,
    build_heldout,
    build_learner,
    build_verifier,
    derived_seed,
    engine_seed,
)
from vapo_async.config import Config, InlineLauncherConfig
from vapo_async.config.load import to_dict
from vapo_async.interrupts import Stop
from vapo_async.launcher.preflight import replayed_turns
from vapo_async.launcher.schedule import Schedule
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import UpdateResult
from vapo_async.models.load import load_tokenizer
from vapo_async.prompts.tasks import build_task
from vapo_async.stages import (
    EvaluationResult,
    FlowStats,
    TakenBatch,
    evaluate,
    score_requests,
    verifier_counters,
    write_scores,
)
from vapo_async.state import read_state, write_state
from vapo_async.weights.mailbox import published_tensors

FLOW, COLLECTOR, INLINE_FILE = "flow", "collector", "inline.json"
"""Names in a checkpoint."""


class InlineStages:
    """See :class:`vapo_async.stages.Stages`."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        assert isinstance(config.launcher, InlineLauncherConfig)
        torch.set_num_threads(config.learner.threads)
        self._config = config
        self._tokenizer = load_tokenizer(base.tokenizer)
        self.flow = build_flow(config, base)
        self.collector = build_collector(config, base, worker=0)
        self.learner = build_learner(config, base)
        seed = derived_seed(config.seed, "schedule")
        self._schedule = Schedule(config.launcher.overlap_steps, seed, replayed_turns(config))
        self._verifier = build_verifier(config)
        self._evaluator = build_evaluator(config, base)
        task = build_task(config.task, config.seed)
        self._heldout = build_heldout(config, task, self._tokenizer, config.evaluation.problems)
        self._evaluations: list[EvaluationResult] = []
        self._generation_wait_s = self._verdict_wait_s = 0.0

    def record(self, path: Path) -> None:
        """Writes the schedule there, before :meth:`load`."""
        self._schedule.record(path)

    def take(self, stop: Stop) -> TakenBatch | None:
        while (batch := self.flow.take()) is None:
            if stop():
                return self.stop_taking()
            if self._drop_straggler():
                continue
            if not self._generate():
                raise RuntimeError(f"nothing to generate and no batch: {self.flow.why_waiting()}")
            self._schedule.stepped()
        return TakenBatch(batch, batch.ages, batch.version, batch.tickets, batch.group_ids)

    def learn(self, batch: TakenBatch) -> UpdateResult:
        overlap = self._schedule.taken()
        start = time.perf_counter()
        result = self.learner.update(batch.handle.groups.unbind(0), batch.version)
        self._generation_wait_s += time.perf_counter() - start
        steps = 0
        while steps < overlap and self._generate():
            steps += 1
        self._schedule.overlapped(steps)
        return result

    def publish(self, policy_changed: bool) -> int:
        version = self.flow.published + 1
        self.collector.load_weights(version, published_tensors(self.learner.policy) if policy_changed else None)
        self._schedule.published(version)  # may meet a full disk: before the version is counted
        published = self.flow.publish()
        assert published == version, "nobody else publishes"
        return version

    def start_evaluation(self, step: int) -> None:
        if step:
            self._evaluator.load_weights(step, published_tensors(self.learner.policy))
        self._evaluations.append(
            evaluate(
                self._evaluator,
                self._verifier,
                self._heldout,
                step=step,
                samples=self._config.evaluation.samples,
            )
        )

    @property
    def evaluations_running(self) -> int:
        return 0

    def finished_evaluations(self, stop: Stop) -> list[EvaluationResult]:
        finished, self._evaluations = self._evaluations, []
        return finished

    def stop_taking(self) -> TakenBatch | None:
        self.flow.close()
        return None

    def stats(self) -> FlowStats:
        return FlowStats(
            generated_tokens=self.collector.generated_tokens,
            generation_wait_s=self._generation_wait_s,
            workers=1,
            flow=self.flow.counters(),
            verifier=verifier_counters(self._verifier),
            verdict_wait_s=self._verdict_wait_s,
        )

    def save(self, folder: Path) -> None:
        save_learner(self.learner, self._tokenizer, folder)
        # The carried responses are for another launcher: here the collector goes on with its own.
        write_state(self.flow.state_dict(self.collector.partial_groups()), folder, FLOW)
        write_state(self.collector.state_dict(), folder, COLLECTOR)
        state: dict[str, Any] = {
            "version": self.flow.published,
            "settings": self._settings(),
            "schedule": self._schedule.state_dict(),
        }
        (folder / INLINE_FILE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        load_learner(self.learner, folder)
        state = json.loads((folder / INLINE_FILE).read_text()) if (folder / INLINE_FILE).exists() else {}
        if state.get("settings") == self._settings():
            self._load_exactly(folder, state)
        else:  # another launcher's, or with other settings: responses are gone on with, random states start anew
            self.flow.load_state_dict(read_state(folder, FLOW))
            self.collector.load_weights(self.flow.published, published_tensors(self.learner.policy))
            self.collector.seed(engine_seed(self._config, 0, self.flow.published))
            self._schedule.start(self.flow.published)

    def shutdown(self, logs: Path | None = None) -> None:
        self._verifier.close()

    def _settings(self) -> dict[str, Any]:
        """What the state of engine and collector is good for."""
        config = to_dict(self._config)
        task = {key: config["task"][key] for key in ("max_prompt_tokens", "max_response_tokens")}
        engine = {key: value for key, value in config["engine"].items() if key != "max_mismatch"}
        return {"engine": engine, "max_staleness": config["buffer"]["max_staleness"], **task}

    def _load_exactly(self, folder: Path, state: dict[str, Any]) -> None:
        self.collector.load_weights(state["version"], published_tensors(self.learner.policy))
        self.collector.load_state_dict(read_state(folder, COLLECTOR))
        self.flow.load_state_dict(read_state(folder, FLOW), owned=self.collector.tickets)
        assert self.flow.published == state["version"], "flow and engine were saved at one moment"
        self._schedule.load_state_dict(state["schedule"])

    def _generate(self) -> bool:
        """Starts what may be started and makes one decode step; False if there is nothing to generate."""
        for assignment in self.flow.admit(self._config.algorithm.groups_per_batch):
            self.collector.start(assignment.ticket, assignment.prompt, assignment.carried)
        if not self.collector.busy:
            return False
        finished_groups = self.collector.step()
        start = time.perf_counter()
        for finished in finished_groups:
            write_scores(finished, self._verifier.score(score_requests(finished)))
            self._verdict_wait_s += time.perf_counter() - start
            self.flow.commit(finished.ticket.ticket_id, finished.group)
        return True

    def _drop_straggler(self) -> bool:
        """Cancels the group that the batch waits for, if its time is over or the replayed schedule says so."""
        if self._schedule.replays:
            ticket_id = self._schedule.drop_now()
            if ticket_id is not None:
                if ticket_id not in self.collector.tickets:
                    raise self._schedule.not_running(ticket_id)
                self.flow.drop(ticket_id)
        else:
            overdue = self.flow.drop_overdue(time.monotonic())
            ticket_id = None if overdue is None else overdue[0]
        if ticket_id is None:
            return False
        self.flow.dropped(ticket_id, self.collector.cancel(ticket_id))
        self._schedule.dropped(ticket_id)
        return True
