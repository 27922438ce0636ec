"""Prompts without end, in an order that a resumed run takes up again; returned prompts come first."""

import heapq
import random
from typing import Any

from transformers import PreTrainedTokenizerBase

from vapo_async.config import ConfigError, TaskConfig
from vapo_async.prompts.tasks import Task
from vapo_async.prompts.template import render
from vapo_async.schema import Problem, Prompt


class PromptStream:
    """Passes over ``task.train``, each in an order of its own that ``seed`` and the epoch decide.

    A prompt's ``group_id`` is the number of fresh prompts before it. A returned prompt keeps its own and is handed
    out again before any fresh one, the smallest ``group_id`` first. The state is plain JSON data of a few numbers.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, task_config: TaskConfig, seed: int) -> None:
        self._task, self._tokenizer, self._task_config, self._seed = task, tokenizer, task_config, seed
        self._epoch = 0
        self._position = 0  # in the epoch's order
        self._next_group_id = 0
        self._too_long: set[int] = set()
        self._returned: list[tuple[int, int]] = []  # heap of (group_id, place in task.train)
        self._order = self._shuffled()

    @property
    def left_out(self) -> int:
        """Training problems met so far whose prompt is longer than ``max_prompt_tokens``."""
        return len(self._too_long)

    def next(self) -> Prompt:
        """The next prompt: a returned one if there is any, else a fresh one."""
        if self._returned:
            group_id, index = heapq.heappop(self._returned)
            return self._prompt(group_id, self._task.train[index])
        while True:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled()
            index = self._order[self._position]
            self._position += 1
            if index in self._too_long:
                continue
            prompt = self._prompt(self._next_group_id, self._task.train[index])
            if len(prompt.token_ids) <= self._task_config.max_prompt_tokens:
                self._next_group_id += 1
                return prompt
            self._too_long.add(index)
            if len(self._too_long) == len(self._order):
                raise ConfigError(
                    f"every one of the {len(self._order)} training prompts is longer than task.max_prompt_tokens="
                    f"{self._task_config.max_prompt_tokens} (the last one has {len(prompt.token_ids)}): raise it"
                )

    def put_back(self, prompt: Prompt) -> None:
        """Hands a prompt back whose ticket was refunded: ``next`` gives it out again, under its ``group_id``."""
        if any(group_id == prompt.group_id for group_id, _ in self._returned):
            raise ValueError(f"prompt of group {prompt.group_id} was put back twice")
        if prompt.group_id >= self._next_group_id:
            raise ValueError(f"prompt of group {prompt.group_id} is not from this stream")
        heapq.heappush(self._returned, (prompt.group_id, prompt.problem.index))

    def state_dict(self) -> dict[str, Any]:
        """JSON data. Prompts that were handed out and not put back are not in it: who has them keeps them."""
        return {
            "seed": self._seed,
            "problems": len(self._order),
            "epoch": self._epoch,
            "position": self._position,
            "next_group_id": self._next_group_id,
            "too_long": sorted(self._too_long),
            "returned": [list(entry) for entry in sorted(self._returned)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up where ``state_dict`` was called; refuses the state of other training data or another seed."""
        if state["seed"] != self._seed:
            raise ConfigError(
                "the checkpoint was written with another seed: leave `seed` out to go on with the run's own"
            )
        if state["problems"] != len(self._order):
            raise ConfigError(
                f"the checkpoint was written with {state['problems']:,} training problems, this run has "
                f"{len(self._order):,}: resume with the task that the run was started with"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._next_group_id = state["next_group_id"]
        self._too_long = set(state["too_long"])
        self._returned = [(group_id, index) for group_id, index in state["returned"]]
        heapq.heapify(self._returned)
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._task.train)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order

    def _prompt(self, group_id: int, problem: Problem) -> Prompt:
        text, token_ids = render(problem, self._tokenizer, self._task_config)
        return Prompt(group_id, problem, text, token_ids)
