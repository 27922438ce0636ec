"""The verifier stage: response text and reference answer in, verdict and reward out."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vapo_async.config import ChainSumTaskConfig, ConfigError, DatasetTaskConfig, TaskConfig, VerifierConfig
from vapo_async.schema import Problem, Score
from vapo_async.verifier.extract import extract_answer
from vapo_async.verifier.jobs import EquivalenceJob, Job, Outcome, ReasoningGymJob
from vapo_async.verifier.sandbox import Sandbox
from vapo_async.verifier.shaping import shaped_reward


@dataclass(frozen=True)
class ScoreRequest:
    """One finished response. ``length_tokens`` counts its generated tokens, the end token included."""

    problem: Problem
    text: str
    length_tokens: int


class TaskVerifier:
    """Judges the responses of one task. Threads may share it.

    ``overlong_cache_tokens`` is L_cache of the soft overlong punishment, 0 = off.

    Counters since the start: ``scored`` responses, of them ``timeouts`` and ``crashes`` of the judging process, and
    ``forbidden``: answers that led to something that the process must not do.
    """

    def __init__(self, task: TaskConfig, verifier: VerifierConfig, overlong_cache_tokens: int = 0) -> None:
        if not isinstance(task, ChainSumTaskConfig | DatasetTaskConfig):
            raise ConfigError(f"task is a {type(task).__name__}, expected one with a verifier: chain_sum or dataset")
        self._task, self._overlong_cache_tokens = task, overlong_cache_tokens
        self._sandbox = Sandbox(verifier.workers, verifier.timeout_s, verifier.memory_mb)
        self._counting = threading.Lock()
        self.scored = 0
        self.timeouts = 0
        self.crashes = 0
        self.forbidden = 0

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]:
        """Scores in the order of ``items``. Raises :class:`.sandbox.SandboxError` if nothing can be judged."""
        answers = [extract_answer(item.text, self._task.answer_style) for item in items]
        asked = [i for i, answer in enumerate(answers) if answer is not None]
        outcomes = [Outcome(False, "no answer")] * len(items)
        judged = self._sandbox.run([self._job(items[i].problem, answers[i] or "") for i in asked]) if asked else []
        for i, outcome in zip(asked, judged, strict=True):
            outcomes[i] = outcome
        notes = Counter(outcome.note for outcome in judged)
        with self._counting:
            self.scored += len(items)
            self.timeouts += notes["timeout"]
            self.crashes += notes["crashed"]
            self.forbidden += notes["forbidden"]
        return [self._score(item, outcome) for item, outcome in zip(items, outcomes, strict=True)]

    def close(self) -> None:
        """Ends the worker processes."""
        self._sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _job(self, problem: Problem, pred: str) -> Job:
        match self._task:
            case ChainSumTaskConfig():
                return ReasoningGymJob("chain_sum", problem.answer, pred, problem.metadata or {})
            case DatasetTaskConfig():
                return EquivalenceJob(problem.answer, pred)

    def _score(self, item: ScoreRequest, outcome: Outcome) -> Score:
        reward = shaped_reward(
            outcome.correct,
            item.length_tokens,
            reward_correct=self._task.reward_correct,
            reward_wrong=self._task.reward_wrong,
            max_response_tokens=self._task.max_response_tokens,
            overlong_cache_tokens=self._overlong_cache_tokens,
        )
        return Score(outcome.correct, reward, outcome.note)
