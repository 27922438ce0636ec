"""What is asked and how an answer is judged."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING


class AnswerStyle(Enum):
    """Where a response states its final answer."""

    boxed = "boxed"  # the last \\boxed{...}
    hash = "hash"  # after the last '#' (chain_sum) or '####' (GSM8K)
    last_line = "last_line"  # the last line that is not empty


@dataclass
class TaskConfig:
    """What is asked and how the answer is judged."""

    answer_style: AnswerStyle = AnswerStyle.boxed
    template: str = "{question}"
    """The user's turn; ``{question}`` is replaced. Wrapped in the tokenizer's chat template where it has one."""
    system_prompt: str | None = None
    """The system's turn; stands before the question where there is no chat template. null = none."""
    use_chat_template: bool = True
    """Uses the tokenizer's chat template if it has one."""
    max_prompt_tokens: int = 512
    """Training problems with longer prompts are left out and counted."""
    max_response_tokens: int = 128
    """Length limit of a response, the end token included."""
    heldout_problems: int = 256
    """Held-out problems kept for evaluation; at most as many as the held-out data has."""
    reward_correct: float = 1.0
    """Given on the last token of a correct response."""
    reward_wrong: float = -1.0
    """Likewise where the response is wrong."""


@dataclass
class ChainSumTaskConfig(TaskConfig):
    """Chains of sums and differences by reasoning-gym's generator, judged by its scorer (score == 1.0)."""

    compact: bool = True
    """Asks ``3-9+2:`` as the embedded model reads it; False asks reasoning-gym's English sentence."""
    min_terms: int = 2
    """Numbers in the shortest chain."""
    max_terms: int = 12
    """Numbers in the longest chain."""
    min_digits: int = 1
    """Digits of the shortest number."""
    max_digits: int = 1
    """Digits of the longest number."""
    train_problems: int = 20_000
    """Problems drawn for training; those that also occur in the held-out split are left out."""
    heldout_seed: int = 987_654_321_000
    """Draws the held-out problems: the same ones for every training seed."""


@dataclass
class DatasetTaskConfig(TaskConfig):
    """Rows of a jsonl, json or parquet file, or of a Hugging Face data set, judged by mathematical equivalence."""

    train: str = MISSING
    """A file's path, or the name of a Hugging Face data set."""
    heldout: str | None = None
    """Likewise; null splits ``heldout_problems`` rows off the training rows."""
    hf_config: str | None = None
    """Configuration name of a Hugging Face data set."""
    train_split: str = "train"
    """Split of a Hugging Face data set that training draws from."""
    heldout_split: str = "test"
    """Split that evaluation draws from, where ``heldout`` names a Hugging Face data set."""
    question_column: str = "question"
    """Column of the question; may be a path: ``prompt.0.content``."""
    answer_column: str = "answer"
    """Column of the gold answer; may be a path: ``reward_model.ground_truth``."""
    answer_separator: str | None = None
    """The gold answer is what follows the last one of these in the answer column (GSM8K: ``####``)."""
    skip_incomplete: bool = False
    """Leaves rows without a question or an answer out, with a warning; otherwise such a row is an error."""
