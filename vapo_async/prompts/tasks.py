"""Problems to train on and problems to measure with, which never overlap."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import reasoning_gym

from vapo_async.config import ChainSumTaskConfig, ConfigError, DatasetTaskConfig, TaskConfig
from vapo_async.prompts.datasets import load_problems
from vapo_async.schema import Problem

_SEED_STRIDE = 1_000_003
"""Distance between the generator's seeds of two training seeds (reasoning-gym seeds problem i with seed + i)."""


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


class ChainSumProblems(Sequence[Problem]):
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

    def _make(self, index: int) -> Problem:
        row: dict[str, Any] = self._dataset[index]
        question = f"{row['metadata']['expression'].replace(' ', '')}:" if self._compact else row["question"]
        return Problem(index, question, row["answer"], _plain(row["metadata"]))


class _Selected(Sequence[Problem]):
    """Some of the problems of another sequence, under their old ``index``."""

    def __init__(self, problems: Sequence[Problem], kept: Sequence[int]) -> None:
        self._problems, self._kept = problems, kept

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self._problems[i] for i in self._kept[index]]
        return self._problems[self._kept[index]]


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
