"""From a problem to the text and the tokens that a policy continues."""

import jinja2
from transformers import PreTrainedTokenizerBase

from vapo_async.config import ConfigError, TaskConfig
from vapo_async.schema import Problem

_PLACE = "{question}"
_MOST_UNKNOWN = 0.2
"""Share of unknown tokens in a prompt from which on tokenizer and task do not belong together."""


def render(
    problem: Problem, tokenizer: PreTrainedTokenizerBase, task_config: TaskConfig
) -> tuple[str, tuple[int, ...]]:
    """(text, token ids) of the prompt; ids are authoritative, they hold at most one BOS and never an end token.

    The template's ``{question}`` is replaced, once and literally; the tokenizer's chat template goes around it, with
    the header of the assistant's turn at the end, where there is one and ``use_chat_template`` is on.
    """
    if _PLACE not in task_config.template:
        raise ConfigError(f"task.template is '{task_config.template}'; expected it to contain {_PLACE}: add it")
    turn = task_config.template.replace(_PLACE, problem.question)
    if task_config.use_chat_template and tokenizer.chat_template:
        text = _chat(turn, tokenizer, task_config.system_prompt)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = turn if task_config.system_prompt is None else f"{task_config.system_prompt}\n\n{turn}"
        has_bos = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
        ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]  # some tokenizers close every text: a prompt is to be continued
    _check_known(ids, text, tokenizer)
    return text, tuple(ids)


def _chat(turn: str, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str:
    messages = [{"role": "user", "content": turn}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        raise ConfigError(
            f"the tokenizer's chat template refuses the prompt ({error}); set task.system_prompt=null "
            "or task.use_chat_template=false"
        ) from error


def _check_known(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if not ids or unknown > _MOST_UNKNOWN * len(ids):
        raise ConfigError(
            f"the model's tokenizer cannot read the task's prompts ({unknown} of {len(ids)} tokens unknown in "
            f"'{' '.join(text.split())[:60]}'); choose another model or another task (model=embedded goes with "
            "task=chain_sum)"
        )
