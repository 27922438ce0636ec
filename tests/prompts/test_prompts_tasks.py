import json
from pathlib import Path

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st

from vapo_async.config import ChainSumTaskConfig, ConfigError, DatasetTaskConfig, TaskConfig
from vapo_async.prompts.tasks import ChainSumProblems, build_task, heldout_chains, normalise_question

SMALL = ChainSumTaskConfig(train_problems=2000, heldout_problems=64)


def rows(path: Path, *questions: str) -> str:
    path.write_text("".join(json.dumps({"question": q, "answer": i}) + "\n" for i, q in enumerate(questions)))
    return str(path)


def test_chain_sum_keeps_the_splits_apart_and_counts_what_it_removed() -> None:
    task = build_task(SMALL, seed=0)
    heldout = {problem.question for problem in task.heldout}
    assert len(heldout) == len(task.heldout) == 64
    assert not heldout & {problem.question for problem in task.train}
    assert task.overlap_removed > 0
    assert len(task.train) + task.overlap_removed == 2000


def test_training_seeds_share_the_heldout_split_but_not_the_training_problems() -> None:
    one, two = build_task(SMALL, seed=0), build_task(SMALL, seed=1)
    assert one.heldout == two.heldout
    assert [p.question for p in one.train[:20]] != [p.question for p in two.train[:20]]
    assert one.train[:20] == build_task(SMALL, seed=0).train[:20]


def test_index_is_the_place_in_the_split() -> None:
    task = build_task(SMALL, seed=3)
    assert [problem.index for problem in task.train] == list(range(len(task.train)))
    assert task.train[-1] == task.train[len(task.train) - 1]
    assert [problem.index for problem in task.heldout] == list(range(64))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_chains_carry_what_the_generators_own_scorer_needs(seed: int, compact: bool) -> None:
    problems = ChainSumProblems(ChainSumTaskConfig(compact=compact), 5, seed)
    scorer = reasoning_gym.get_score_answer_fn("chain_sum")
    for problem in problems:
        assert problem.metadata is not None
        expression = str(problem.metadata["expression"])
        assert str(eval(expression)) == problem.answer
        assert problem.question == expression.replace(" ", "") + ":" if compact else expression in problem.question
        entry = {"answer": problem.answer, "metadata": json.loads(json.dumps(problem.metadata))}
        assert entry["metadata"] == problem.metadata
        assert scorer(problem.answer, entry) == 1.0


def test_lazy_problems_are_a_sequence() -> None:
    problems = ChainSumProblems(SMALL, 10, 0)
    assert len(problems) == 10
    assert problems[-1] == problems[9]
    assert problems[2:4] == [problems[2], problems[3]]
    with pytest.raises(IndexError):
        problems[10]


def test_more_heldout_chains_than_there_are_is_told() -> None:
    with pytest.raises(ConfigError, match=r"task.heldout_problems is 500, but only 200 different chains"):
        heldout_chains(ChainSumTaskConfig(max_terms=2, heldout_problems=500))


def test_a_data_set_with_its_own_heldout_file_loses_the_overlap(tmp_path: Path) -> None:
    config = DatasetTaskConfig(
        train=rows(tmp_path / "train.jsonl", "a", "b  c", "d", "B c"), heldout=rows(tmp_path / "test.jsonl", "b c", "e")
    )
    task = build_task(config, seed=0)
    assert task.name == f"{tmp_path.name}/train"
    assert [(p.index, p.question) for p in task.train] == [(0, "a"), (1, "d")]
    assert [p.question for p in task.heldout] == ["b c", "e"]
    assert task.overlap_removed == 1


def test_a_question_is_asked_once_however_often_it_is_in_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Published sets repeat theirs: 30 held-out rows of 32 copies each would be a few problems, many times."""
    repeated = [f"question {i}" for i in range(30) for _ in range(32)]
    train, heldout = rows(tmp_path / "train.jsonl", "a", "b", "A ", "c"), rows(tmp_path / "test.jsonl", *repeated)
    task = build_task(DatasetTaskConfig(train=train, heldout=heldout, heldout_problems=30), seed=0)
    assert [(p.index, p.question, p.answer) for p in task.train] == [(0, "a", "0"), (1, "b", "1"), (2, "c", "3")]
    assert [p.question for p in task.heldout] == [f"question {i}" for i in range(30)]
    assert task.overlap_removed == 0
    assert f"left out 1 rows of {train} whose question came before" in caplog.text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=6, max_size=20), st.integers(1, 3), st.integers(0, 3))
def test_split_off_rows_never_overlap_and_are_the_same_for_every_seed(
    tmp_path_factory: pytest.TempPathFactory, questions: list[str], heldout_problems: int, seed: int
) -> None:
    file = rows(tmp_path_factory.mktemp("split") / "train.jsonl", *questions)
    config = DatasetTaskConfig(train=file, heldout_problems=heldout_problems)
    try:
        task = build_task(config, seed)
    except ConfigError as error:
        assert "leaves no training problem" in str(error)
        return
    assert len(task.heldout) == heldout_problems
    assert task.heldout == build_task(config, seed + 1).heldout
    assert not {p.question for p in task.heldout} & {p.question for p in task.train}
    assert len(task.train) + len(task.heldout) + task.overlap_removed == len(set(questions))


def test_nothing_left_to_train_on_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"leaves no training problem: 2 rows, 2 of them held out"):
        build_task(DatasetTaskConfig(train=rows(tmp_path / "t.jsonl", "a", "b"), heldout_problems=5), seed=0)


def test_an_unknown_task_is_told() -> None:
    with pytest.raises(ConfigError, match="expected chain_sum or dataset"):
        build_task(TaskConfig(), seed=0)


def test_normalised_questions() -> None:
    assert normalise_question(" What\n is  X? ") == normalise_question("what is x?")
