"""Problems to train on and problems to measure with, which never overlap."""

import logging
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import reasoning_gym

from vapo_async.config import ChainSumTaskConfig, ConfigError, DatasetTaskConfig, TaskConfig
from vapo_async.prompts.datasets import load_problems
from vapo_async.schema import Problem

_log = logging.getLogger(__name__)
_SEED_STRIDE = 1_000_003
"""Distance between the generator's seeds of two training seeds (reasoning-gym seeds problem i with seed + i)."""

_DRAW_SEED = 20_250_407
"""Draws held-out rows of a data set: the same at every training seed."""


@dataclass(frozen=True)
class Task:
    """A task's two splits. ``heldout`` is the same for every training seed, so that seeds can be compared."""

    name: str
    train: Sequence[Problem]
    heldout: list[Problem]
    overlap_removed: int = 0
    """Training problems left out because they also occur in ``heldout``."""


def build_task(task: TaskConfig, seed: int) -> Task:
    """The splits that ``task`` describes; ``seed`` is the training seed."""
    match task:
        case ChainSumTaskConfig():
            return _chain_sum(task, seed)
        case DatasetTaskConfig():
            return _dataset(task)
    raise ConfigError(f"task has type {type(task).__name__}; expected chain_sum or dataset: choose one with task=...")


def normalise_question(question: str) -> str:
    """What two questions are compared by: case and white space do not count."""
    return " ".join(question.split()).casefold()


class _LazyProblems(Sequence[Problem]):
    """Problems that are made when they are asked for."""

    @abstractmethod
    def _make(self, index: int) -> Problem:
        """The problem at ``index`` ≥ 0."""

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        return self._make(index % len(self))


class ChainSumProblems(_LazyProblems):
    """Chains by reasoning-gym's generator, made when they are asked for."""

    def __init__(self, task: ChainSumTaskConfig, size: int, seed: int) -> None:
        self._compact = task.compact
        self._dataset = reasoning_gym.create_dataset(
            "chain_sum",
            size=size,
            seed=seed,
            min_terms=task.min_terms,
            max_terms=task.max_terms,
            min_digits=task.min_digits,
            max_digits=task.max_digits,
        )

    def __len__(self) -> int:
        return len(self._dataset)

    def _make(self, index: int) -> Problem:
        row: dict[str, Any] = self._dataset[index]
        question = f"{row['metadata']['expression'].replace(' ', '')}:" if self._compact else row["question"]
        return Problem(index, question, row["answer"], _plain(row["metadata"]))


class _Selected(_LazyProblems):
    """Some of the problems of another sequence; ``index`` is their place in this one."""

    def __init__(self, problems: Sequence[Problem], kept: Sequence[int]) -> None:
        self._problems, self._kept = problems, kept

    def __len__(self) -> int:
        return len(self._kept)

    def _make(self, index: int) -> Problem:
        return replace(self._problems[self._kept[index]], index=index)


def _plain(metadata: dict[str, Any]) -> dict[str, object]:
    """reasoning-gym's metadata as JSON data: tuples become lists."""
    return {
        key: _plain(value) if isinstance(value, dict) else list(value) if isinstance(value, tuple) else value
        for key, value in metadata.items()
    }


def heldout_chains(task: ChainSumTaskConfig) -> list[Problem]:
    """Distinct held-out chains from the task's own ``heldout_seed``."""
    chosen: dict[str, Problem] = {}
    candidates = ChainSumProblems(task, 50 * task.heldout_problems + 1000, task.heldout_seed)
    for problem in candidates:
        chosen.setdefault(normalise_question(problem.question), problem)
        if len(chosen) == task.heldout_problems:
            return list(chosen.values())
    raise ConfigError(
        f"task.heldout_problems is {task.heldout_problems}, but only {len(chosen)} different chains were found: "
        "lower it or raise task.max_terms"
    )


def _chain_sum(task: ChainSumTaskConfig, seed: int) -> Task:
    heldout = heldout_chains(task)
    problems = ChainSumProblems(task, task.train_problems, seed * _SEED_STRIDE)
    train = _without(problems, heldout)
    return Task("chain_sum", train, heldout, len(problems) - len(train))


def _dataset(task: DatasetTaskConfig) -> Task:
    def load(name: str, split: str) -> list[Problem]:
        problems = load_problems(
            name,
            question_column=task.question_column,
            answer_column=task.answer_column,
            answer_separator=task.answer_separator,
            hf_config=task.hf_config,
            split=split,
            skip_incomplete=task.skip_incomplete,
        )
        return _distinct(name, problems)

    rows = load(task.train, task.train_split)
    if task.heldout is not None:
        heldout = _drawn(load(task.heldout, task.heldout_split), task.heldout_problems)
        train = _without(rows, heldout)
        removed = len(rows) - len(train)
    else:
        heldout = _drawn(rows, task.heldout_problems)
        train = _without(rows, heldout)
        removed = len(rows) - len(train) - len(heldout)
    if not train:
        raise ConfigError(
            f"task.train={task.train} leaves no training problem: {len(rows)} rows, {len(heldout)} of them held out; "
            "lower task.heldout_problems or give task.heldout a file of its own"
        )
    return Task(_name(task.train), train, heldout, removed)


def _distinct(name: str, problems: list[Problem]) -> list[Problem]:
    """Each question once, where it comes first: published sets repeat theirs, up to a hundred times."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(normalise_question(problem.question), problem)
    if len(first) < len(problems):
        _log.warning("left out %d rows of %s whose question came before", len(problems) - len(first), name)
    return [replace(problem, index=i) for i, problem in enumerate(first.values())]


def _name(train: str) -> str:
    """``gsm8k/train`` for a file in a folder, ``gsm8k`` for ``openai/gsm8k``."""
    path = Path(train)
    return f"{path.absolute().parent.name}/{path.stem}" if path.suffix else path.name


def _drawn(problems: list[Problem], count: int) -> list[Problem]:
    """``count`` of the problems, in their old order, the same at every training seed."""
    if count >= len(problems):
        return problems
    places = sorted(random.Random(_DRAW_SEED).sample(range(len(problems)), count))
    return [replace(problems[place], index=i) for i, place in enumerate(places)]


def _without(problems: Sequence[Problem], heldout: list[Problem]) -> Sequence[Problem]:
    """The problems whose question is not one of the held-out ones."""
    taken = {normalise_question(problem.question) for problem in heldout}
    return _Selected(problems, [i for i, p in enumerate(problems) if normalise_question(p.question) not in taken])
