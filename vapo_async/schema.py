"""Names, dtypes and shapes of everything that travels between the stages. Nothing else spells a key twice.

One **trajectory** is a TensorDict of batch size ``[]`` whose per-token entries have length L = prompt + response.
One **group** is a lazy stack of the G trajectories sampled for one prompt (batch size ``[G]``, ragged in L).
One **batch** is a lazy stack of B groups, flattened to ``[B * G]`` (ragged in L).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from torch import Tensor

TOKENS = "tokens"  # [L] int64, prompt and response
RESPONSE_MASK = "response_mask"  # [L] bool, True on generated tokens, the end token included
SAMPLE_LOG_PROB = "sample_log_prob"  # [L] float32, under the distribution sampled from; 0 on the prompt
POLICY_VERSION = "policy_version"  # [L] int32, version of the weights that sampled the token; prompt: the admission's
REWARD = "reward"  # [L] float32, on the last generated token
CORRECT = "correct"  # [] bool, the verifier's verdict before any shaping
FINISH_REASON = "finish_reason"  # [] int8, a FinishReason
GROUP_ID = "group_id"  # [] int64, which prompt
TICKET_ID = "ticket_id"  # [] int64, which admission

# Added by the learner, [L] float32 each.
STATE_VALUE = "state_value"
PROX_LOG_PROB = "prox_log_prob"
ADVANTAGE = "advantage"
VALUE_TARGET = "value_target"

TRAJECTORY_DTYPES: dict[str, torch.dtype] = {
    TOKENS: torch.int64,
    RESPONSE_MASK: torch.bool,
    SAMPLE_LOG_PROB: torch.float32,
    POLICY_VERSION: torch.int32,
    REWARD: torch.float32,
    CORRECT: torch.bool,
    FINISH_REASON: torch.int8,
    GROUP_ID: torch.int64,
    TICKET_ID: torch.int64,
}
PER_TOKEN_KEYS = (TOKENS, RESPONSE_MASK, SAMPLE_LOG_PROB, POLICY_VERSION, REWARD)


class FinishReason(IntEnum):
    """Why a response ended."""

    STOP = 0  # the end token was sampled
    LENGTH = 1  # the length limit cut it
    ABORTED = 2  # cancelled by the caller


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer, before any template.

    ``index`` is its place in the split (stable for a seed); ``metadata`` is plain JSON data for the task's own scorer.
    """

    index: int
    question: str
    answer: str
    metadata: dict[str, object] | None = None


@dataclass(frozen=True)
class Prompt:
    """What a ticket generates for: a problem, rendered and tokenised. ``group_id`` survives refunds."""

    group_id: int
    problem: Problem
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Ticket:
    """The right to generate one group. ``version`` = publications at admission: the oldest a token of it can be."""

    ticket_id: int
    version: int


@dataclass(frozen=True)
class Score:
    """The verifier's word on one response: ``correct`` before shaping, ``reward`` after it."""

    correct: bool
    reward: float
    note: str = ""  # "" or why the answer could not be judged: "timeout", "crashed", "no answer"


@dataclass
class Response:
    """One response: three parallel lists over its generated tokens, the end token included.

    ``ABORTED`` marks one that is not finished: cut by the caller, or a copy of one in flight. It can be gone on with.
    """

    sample_index: int  # 0 … G-1 within its group
    token_ids: list[int]
    log_probs: list[float]
    versions: list[int]
    finish_reason: FinishReason


def make_trajectory(prompt: Prompt, ticket: Ticket, response: Response) -> TensorDict:
    """A trajectory without its score: ``reward`` is 0 and ``correct`` False until :func:`set_score`."""
    p, n = len(prompt.token_ids), len(response.token_ids)
    mask = torch.zeros(p + n, dtype=torch.bool)
    mask[p:] = True
    return TensorDict(
        {
            TOKENS: torch.tensor([*prompt.token_ids, *response.token_ids], dtype=torch.int64),
            RESPONSE_MASK: mask,
            SAMPLE_LOG_PROB: torch.tensor([0.0] * p + response.log_probs, dtype=torch.float32),
            POLICY_VERSION: torch.tensor([ticket.version] * p + response.versions, dtype=torch.int32),
            REWARD: torch.zeros(p + n, dtype=torch.float32),
            CORRECT: torch.tensor(False),
            FINISH_REASON: torch.tensor(int(response.finish_reason), dtype=torch.int8),
            GROUP_ID: torch.tensor(prompt.group_id, dtype=torch.int64),
            TICKET_ID: torch.tensor(ticket.ticket_id, dtype=torch.int64),
        }
    )


def set_score(trajectory: TensorDictBase, score: Score) -> None:
    """Writes the verdict, and the reward on the last generated token."""
    reward = torch.zeros_like(trajectory[REWARD])
    reward[-1] = score.reward
    trajectory[REWARD] = reward
    trajectory[CORRECT] = torch.tensor(score.correct)


def stack_group(trajectories: Sequence[TensorDictBase]) -> LazyStackedTensorDict:
    """G trajectories of one prompt as one group, batch size [G]."""
    return LazyStackedTensorDict(*trajectories, stack_dim=0)


def check_trajectory(trajectory: TensorDictBase) -> None:
    """Raises ``ValueError`` that names the key, what was found and what is expected."""
    for key, dtype in TRAJECTORY_DTYPES.items():
        value = trajectory.get(key, None)
        if value is None:
            raise ValueError(f"trajectory has no key '{key}'; expected keys: {', '.join(TRAJECTORY_DTYPES)}")
        if value.dtype != dtype:
            raise ValueError(f"trajectory key '{key}' has dtype {value.dtype}, expected {dtype}")
        expected = trajectory[TOKENS].shape if key in PER_TOKEN_KEYS else torch.Size([])
        if value.shape != expected:
            raise ValueError(f"trajectory key '{key}' has shape {list(value.shape)}, expected {list(expected)}")
    if not bool(trajectory[RESPONSE_MASK][-1]):
        raise ValueError(
            f"trajectory key '{RESPONSE_MASK}' must be True on the last token: the response is empty or padded"
        )


def oldest_version(group: TensorDictBase) -> int:
    """The smallest ``policy_version`` among the generated tokens of a group: what its age is counted from."""
    return min(int(t[POLICY_VERSION][t[RESPONSE_MASK]].min()) for t in group.unbind(0))


def pad_stack(trajectories: Sequence[TensorDictBase], key: str, length: int | None = None) -> Tensor:
    """Right-padded [N, L_max] tensor of one per-token key; padding is 0 or False."""
    rows = [t[key] for t in trajectories]
    longest = max(len(r) for r in rows) if length is None else length
    out = torch.zeros(len(rows), longest, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
