"""Worked solutions of training problems: what a supervised warm start learns from."""

import re

from transformers import PreTrainedTokenizerBase

from vapo_async.config import AnswerStyle, ChainSumTaskConfig, ConfigError, TaskConfig
from vapo_async.prompts.tasks import build_task
from vapo_async.prompts.template import render
from vapo_async.schema import Problem

_ANSWERS = {AnswerStyle.hash: "#{}", AnswerStyle.boxed: "\\boxed{{{}}}", AnswerStyle.last_line: "\n{}"}


def worked_chain(problem: Problem, style: AnswerStyle) -> str:
    """``3-9=-6+2=-4#-4`` for the chain ``3 - 9 + 2``: running totals from left to right, then the answer.

    A quarter shorter than the embedded base's ``3-9=-6;-6+2=-4;#-4``.
    """
    first, *terms = re.findall(r"[+-]?\d+", str((problem.metadata or {})["expression"]).replace(" ", ""))
    total, worked = int(first), first
    for term in terms:
        total += int(term)
        worked += f"{term}={total}"
    return worked + _ANSWERS[style].format(total)


def worked_examples(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, count: int, seed: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Token ids of prompt and worked solution (end token included) of ``seed``'s first ``count`` training problems.

    Prompts are rendered as for training; problems that are held out are not among them.

    Raises:
        ConfigError: the task has no worked solutions or too few problems, or one does not fit the length limits.
    """
    if not isinstance(task, ChainSumTaskConfig):
        raise ConfigError("model.warm_start_steps must be 0 here: only task=chain_sum has worked solutions")
    problems = build_task(task, seed).train
    if len(problems) < count:
        raise ConfigError(
            f"the warm start takes {count:,} training problems and the task has {len(problems):,}: raise "
            "task.train_problems or lower model.warm_start_steps"
        )
    end = tokenizer.eos_token_id
    examples = []
    for problem in problems[:count]:
        prompt = render(problem, tokenizer, task)[1]
        response = (*tokenizer(worked_chain(problem, task.answer_style), add_special_tokens=False)["input_ids"], end)
        for key, found, limit in (
            ("max_prompt_tokens", len(prompt), task.max_prompt_tokens),
            ("max_response_tokens", len(response), task.max_response_tokens),
        ):
            if found > limit:
                raise ConfigError(f"task.{key} must be ≥ {found} for the warm start's worked solutions, found {limit}")
        examples.append((prompt, response))
    return examples
