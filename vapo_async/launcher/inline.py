"""One process, one thread of control: a run is a function of its config and seed.

Generation advances inside :meth:`InlineStages.take` only, one decode step at a time, until the flow has a batch;
responses that are not done then stay in flight across the publication. With ``max_staleness`` 0 this is synchronous
training.
"""

import json
import time
from pathlib import Path

import torch

from vapo_async.build import (
    BaseModel,
    build_collector,
    build_evaluator,
    build_flow,
    build_heldout,
    build_learner,
    build_verifier,
    engine_seed,
)
from vapo_async.config import Config
from vapo_async.interrupts import Stop
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
from vapo_async.weights.mailbox import Mailbox, published_tensors

FLOW_FILE = "flow.json"


class InlineStages:
    """See :class:`vapo_async.stages.Stages`."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        torch.set_num_threads(config.learner.threads)
        self._config = config
        self._tokenizer = load_tokenizer(base.tokenizer)
        self.flow = build_flow(config, base)
        self.collector = build_collector(config, base, worker=0)
        self.learner = build_learner(config, base)
        self._verifier = build_verifier(config)
        self._evaluator = build_evaluator(config, base)
        task = build_task(config.task, config.seed)
        self._heldout = build_heldout(config, task, self._tokenizer, config.evaluation.problems)
        self._mailbox = Mailbox()
        self._evaluations: list[EvaluationResult] = []
        self._generation_wait_s = 0.0

    def take(self, stop: Stop) -> TakenBatch | None:
        while (batch := self.flow.take()) is None:
            if stop():
                return self.stop_taking()
            for assignment in self.flow.admit(self._config.algorithm.groups_per_batch):
                self.collector.start(assignment.ticket, assignment.prompt)
            if not self.collector.busy:
                raise RuntimeError(f"nothing to generate and no batch: {self.flow.why_waiting()}")
            for finished in self.collector.step():
                write_scores(finished, self._verifier.score(score_requests(finished)))
                self.flow.commit(finished.ticket.ticket_id, finished.group)
        return TakenBatch(batch, batch.ages, batch.version, batch.tickets, batch.group_ids)

    def learn(self, batch: TakenBatch) -> UpdateResult:
        start = time.perf_counter()
        result = self.learner.update(batch.handle.groups.unbind(0), batch.version)
        self._generation_wait_s += time.perf_counter() - start
        return result

    def publish(self, policy_changed: bool) -> int:
        tensors = published_tensors(self.learner.policy) if policy_changed else None
        self._mailbox.publish(self.flow.published + 1, tensors)
        self._pull_weights()
        return self.flow.publish()

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
        )

    def save(self, folder: Path) -> None:
        save_learner(self.learner, self._tokenizer, folder)
        (folder / FLOW_FILE).write_text(json.dumps(self.flow.state_dict(), indent=1))

    def load(self, folder: Path) -> None:
        load_learner(self.learner, folder)
        self.flow.load_state_dict(json.loads((folder / FLOW_FILE).read_text()))
        self.collector.seed(engine_seed(self._config, 0, self.flow.published))
        self._mailbox.publish(self.flow.published, published_tensors(self.learner.policy))
        self._pull_weights()

    def shutdown(self, logs: Path | None = None) -> None:
        self._verifier.close()

    def _pull_weights(self) -> None:
        publication = self._mailbox.pull()
        if publication is not None:
            self.collector.load_weights(*publication)
