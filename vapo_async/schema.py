"""Names, dtypes and shapes of everything that travels between the stages. Nothing else spells a key twice.

One **trajectory** is a TensorDict of batch size ``[]`` whose per-token entries have length L = prompt + response.
One **group** is a lazy stack of the G trajectories sampled for one prompt (batch size ``[G]``, ragged in L).
One **batch** is a lazy stack of B groups, flattened to ``[B * G]`` (ragged in L).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

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
_SCALAR = torch.Size([])


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


def prompt_to_json(prompt: Prompt) -> dict[str, Any]:
    """A prompt in full, as JSON data."""
    problem = prompt.problem
    return {
        "group_id": prompt.group_id,
        "index": problem.index,
        "question": problem.question,
        "answer": problem.answer,
        "metadata": problem.metadata,
        "text": prompt.text,
        "token_ids": list(prompt.token_ids),
    }


def prompt_from_json(data: dict[str, Any]) -> Prompt:
    """The reverse of :func:`prompt_to_json`."""
    problem = Problem(data["index"], data["question"], data["answer"], data["metadata"])
    return Prompt(data["group_id"], problem, data["text"], tuple(data["token_ids"]))


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
    check_trajectories([trajectory])


def check_trajectories(trajectories: Sequence[TensorDictBase]) -> dict[str, list[Tensor]]:
    """As :func:`check_trajectory` on each of them, and their entries by key; much less than N times the time."""
    columns: dict[str, list[Tensor]] = {key: [] for key in TRAJECTORY_DTYPES}
    for trajectory in trajectories:
        entries = dict(trajectory.items())  # one access for all keys: that is what takes time
        missing = next((key for key in TRAJECTORY_DTYPES if key not in entries), None)
        if missing is not None:
            raise ValueError(f"trajectory has no key '{missing}'; expected keys: {', '.join(TRAJECTORY_DTYPES)}")
        tokens = entries[TOKENS].shape
        for key, dtype in TRAJECTORY_DTYPES.items():
            value, expected = entries[key], tokens if key in PER_TOKEN_KEYS else _SCALAR
            if value.dtype != dtype:
                raise ValueError(f"trajectory key '{key}' has dtype {value.dtype}, expected {dtype}")
            if value.shape != expected:
                raise ValueError(f"trajectory key '{key}' has shape {list(value.shape)}, expected {list(expected)}")
            columns[key].append(value)
        if len(tokens) != 1 or tokens[0] == 0:
            raise ValueError(f"trajectory key '{TOKENS}' has shape {list(tokens)}, expected [L] with L >= 1")
    if not bool(torch.stack([mask[-1] for mask in columns[RESPONSE_MASK]]).all()):
        raise ValueError(
            f"trajectory key '{RESPONSE_MASK}' must be True on the last token: the response is empty or padded"
        )
    return columns


def oldest_version(group: TensorDictBase) -> int:
    """The smallest ``policy_version`` among the generated tokens of a group: what its age is counted from."""
    trajectories = group.unbind(0)
    return oldest_of([t[POLICY_VERSION] for t in trajectories], [t[RESPONSE_MASK] for t in trajectories])


def oldest_of(versions: Sequence[Tensor], masks: Sequence[Tensor]) -> int:
    """As :func:`oldest_version`: ``versions`` G times [L] int32, ``masks`` G times [L] bool."""
    return int(torch.cat([*versions])[torch.cat([*masks])].min())


def response_lengths(group: TensorDictBase) -> list[int]:
    """[G] generated tokens of each trajectory."""
    lengths: list[int] = torch.stack([trajectory[RESPONSE_MASK].sum() for trajectory in group.unbind(0)]).tolist()
    return lengths


def pad_stack(trajectories: Sequence[TensorDictBase], key: str, length: int | None = None) -> Tensor:
    """Right-padded [N, L_max] tensor of one per-token key; padding is 0 or False."""
    rows = [t[key] for t in trajectories]
    longest = max(len(r) for r in rows) if length is None else length
    out = torch.zeros(len(rows), longest, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
