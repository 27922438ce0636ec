"""What the control loop needs from the stages, whichever processes they live in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vapo_async.build import HeldOut
from vapo_async.collector.collector import FinishedGroup
from vapo_async.collector.evaluator import Evaluator
from vapo_async.config import RunError
from vapo_async.flow import FlowCounters
from vapo_async.interrupts import Stop
from vapo_async.learner.learner import UpdateResult
from vapo_async.schema import RESPONSE_MASK, Score, set_score
from vapo_async.verifier.scoring import ScoreRequest, TaskVerifier

_SCORED_TOGETHER = 64


class StageTimeoutError(RunError):
    """A wait ran out; the message says who waited for whom, for how long, and what to do."""


class StageDiedError(RunError):
    """A stage's process ended before the run did; the message names it."""


@dataclass(frozen=True)
class TakenBatch:
    """A batch on its way to the learner: ``handle`` is the launcher's own."""

    handle: Any
    ages: list[int]
    """[B] versions."""
    version: int
    tickets: list[int]
    """[B] ticket ids: what the ledger of the run writes down."""
    group_ids: list[int]
    """[B] which prompts."""


@dataclass(frozen=True)
class EvaluationResult:
    """Verdicts [problems][k] of the policy after ``step`` updates."""

    step: int
    correct: list[list[bool]]
    mean_length: float


@dataclass(frozen=True)
class FlowStats:
    """Where generation and tickets stand: sums that never fall.

    ``flow`` counts over resumes. The others count from the start of this process or go on from the checkpoint that it
    loaded, as the launcher has them: what came since is a difference to the stats right after the load.
    """

    generated_tokens: int
    generation_wait_s: float
    """Seconds that rollout workers had nothing to generate, summed over workers."""
    workers: int
    flow: FlowCounters = field(default_factory=FlowCounters)
    verifier: dict[str, int] = field(default_factory=dict)
    """Counters of the verifier: answers scored, time-outs, crashes."""
    verdict_wait_s: float = 0.0
    """Seconds that finished groups waited for their verdicts, summed over groups."""
    restarts: dict[str, int] = field(default_factory=dict)
    """Dead processes that were replaced, by stage."""


@dataclass(frozen=True)
class StepTimes:
    """Where the seconds of one turn of the control loop went."""

    waited_s: float
    """The learner, for its batch."""
    learned_s: float
    published_s: float
    """Until every engine had the new weights at hand."""


class Stages(Protocol):
    """One launcher's way to run the stages. ``take`` → ``learn`` → ``publish``, again and again."""

    def take(self, stop: Stop) -> TakenBatch | None:
        """Waits for the next batch. Once ``stop`` says so, what :meth:`stop_taking` returns."""
        ...

    def learn(self, batch: TakenBatch) -> UpdateResult:
        """Trains on a batch."""
        ...

    def publish(self, policy_changed: bool) -> int:
        """Hands the learner's weights to every engine, then counts the version. Returns the new version."""
        ...

    def start_evaluation(self, step: int) -> None:
        """Evaluates the learner's present policy, beside training. Step 0 is the base and has to be the first."""
        ...

    @property
    def evaluations_running(self) -> int: ...

    def finished_evaluations(self, stop: Stop) -> list[EvaluationResult]:
        """Those that ended since the last call, in the order of their start; waits for the others until ``stop``.

        Raises:
            RunError: the oldest one failed; it is not running any more.
        """
        ...

    def stop_taking(self) -> TakenBatch | None:
        """Closes the flow; returns the batch that was on its way already, which has to be learned and published."""
        ...

    def stats(self) -> FlowStats: ...

    def save(self, folder: Path) -> None:
        """Writes all that an exact resume needs into an existing folder."""
        ...

    def load(self, folder: Path) -> None:
        """The reverse, before the first ``take``; engines get the weights too."""
        ...

    def shutdown(self, logs: Path | None = None) -> None:
        """Ends every process of the stages; what they wrote is kept in the folder ``logs``. May be called twice."""
        ...


class Scorer(Protocol):
    """Judges responses: the verifier itself, or a stand-in for one in another process."""

    def score(self, items: Sequence[ScoreRequest]) -> list[Score]: ...


def verifier_counters(verifier: TaskVerifier) -> dict[str, int]:
    """Answers judged so far; of them those that cost the judge its time or its life, or tried what is forbidden."""
    return {
        "scored": verifier.scored,
        "timeouts": verifier.timeouts,
        "crashes": verifier.crashes,
        "forbidden": verifier.forbidden,
    }


def score_requests(finished: FinishedGroup) -> list[ScoreRequest]:
    """What the verifier has to judge of a group."""
    return [
        ScoreRequest(finished.prompt.problem, text, int(trajectory[RESPONSE_MASK].sum()))
        for text, trajectory in zip(finished.texts, finished.group.unbind(0), strict=True)
    ]


def write_scores(finished: FinishedGroup, scores: Sequence[Score]) -> None:
    """Rewards and verdicts into the group's trajectories."""
    for trajectory, score in zip(finished.group.tensordicts, scores, strict=True):
        set_score(trajectory, score)


def evaluate(evaluator: Evaluator, verifier: Scorer, heldout: HeldOut, *, step: int, samples: int) -> EvaluationResult:
    """Samples and judges the held-out problems."""
    sampled = evaluator.sample(heldout.prompts, samples)
    requests = [
        ScoreRequest(problem, text, length)
        for problem, responses in zip(heldout.problems, sampled, strict=True)
        for text, length in zip(responses.texts, responses.lengths, strict=True)
    ]
    verdicts = [
        score.correct
        for start in range(0, len(requests), _SCORED_TOGETHER)  # training's answers get their turn in between
        for score in verifier.score(requests[start : start + _SCORED_TOGETHER])
    ]
    lengths = [length for responses in sampled for length in responses.lengths]
    return EvaluationResult(
        step,
        [verdicts[i : i + samples] for i in range(0, len(verdicts), samples)],
        sum(lengths) / len(lengths),
    )
