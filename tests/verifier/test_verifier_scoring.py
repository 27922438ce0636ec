"""The stage: response texts in, scores out."""

from collections.abc import Iterator

import pytest

from vapo_async.config import (
    AnswerStyle,
    ChainSumTaskConfig,
    ConfigError,
    DatasetTaskConfig,
    TaskConfig,
    VerifierConfig,
)
from vapo_async.schema import Problem, Score
from vapo_async.verifier import ScoreRequest, TaskVerifier

LIMITS = VerifierConfig(workers=1, timeout_s=2.0)


@pytest.fixture(scope="module")
def chain_sum() -> Iterator[TaskVerifier]:
    task = ChainSumTaskConfig(answer_style=AnswerStyle.hash, max_response_tokens=100)
    with TaskVerifier(task, LIMITS, overlong_cache_tokens=20) as verifier:
        yield verifier


def test_chain_sum(chain_sum: TaskVerifier) -> None:
    problem = Problem(0, "3-9+2:", "-4", {"difficulty": {"num_terms": [2, 4]}})
    texts = ["3-9=-6;-6+2=-4;#-4", "3-9=-6;#-6", "3-9=-6", "#-4"]
    requests = [ScoreRequest(problem, text, length) for text, length in zip(texts, [19, 19, 19, 90], strict=True)]
    assert chain_sum.score(requests) == [
        Score(True, 1.0),
        Score(False, -1.0),
        Score(False, -1.0, "no answer"),
        Score(True, 0.5),
    ]
    assert (chain_sum.scored, chain_sum.timeouts, chain_sum.crashes) == (4, 0, 0)


def test_dataset_counts_timeouts() -> None:
    task = DatasetTaskConfig(train="unused.jsonl", reward_wrong=0.0)
    problem = Problem(0, "?", r"\frac{1}{2}")
    texts = [r"so \boxed{0.5}", r"\boxed{10^{10^{10}}!}", r"\boxed{2/4}", "0.5", r"\boxed{" + "1" * 5000 + "}"]
    with TaskVerifier(task, LIMITS, overlong_cache_tokens=20) as verifier:
        scores = verifier.score([ScoreRequest(problem, text, 10) for text in texts])
        assert [score.correct for score in scores] == [True, False, True, False, False]
        assert [score.note for score in scores] == ["", "timeout", "", "no answer", "too long"]
        assert [score.reward for score in scores] == [1.0, 0.0, 1.0, 0.0, 0.0]
        assert (verifier.scored, verifier.timeouts, verifier.crashes) == (5, 1, 0)
        assert verifier.score([]) == []


def test_a_task_without_a_verifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="chain_sum or dataset"):
        TaskVerifier(TaskConfig(), LIMITS)
