"""A batch as the learner holds it: right-padded [N, T] tensors on its device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tensordict import TensorDictBase
from torch import Tensor

from vapo_async import schema
from vapo_async.schema import FinishReason


@dataclass
class LearnerBatch:
    """N responses padded to the longest, T. What the learner adds starts as zeros, [N, T] float32 each."""

    tokens: Tensor  # [N, T] int64
    mask: Tensor  # [N, T] bool
    sample_log_prob: Tensor  # [N, T] float32
    policy_version: Tensor  # [N, T] int32
    reward: Tensor  # [N, T] float32
    correct: Tensor  # [N] bool
    truncated: Tensor  # [N] bool, cut by the length limit
    group_id: Tensor  # [N] int64
    lengths: list[int]  # prompt + response, tokens
    age: Tensor = field(init=False)  # [N, T] int64, versions between a token's policy and the learner's
    trained: Tensor = field(init=False)  # [N, T] bool, the part of ``mask`` that the losses are over
    state_value: Tensor = field(init=False)
    prox_log_prob: Tensor = field(init=False)
    ref_log_prob: Tensor = field(init=False)
    advantage: Tensor = field(init=False)
    value_target: Tensor = field(init=False)

    def __post_init__(self) -> None:
        zeros = torch.zeros_like(self.sample_log_prob)
        self.age = torch.zeros_like(self.tokens)
        self.trained = self.mask
        self.state_value, self.prox_log_prob, self.ref_log_prob = zeros.clone(), zeros.clone(), zeros.clone()
        self.advantage, self.value_target = zeros.clone(), zeros.clone()

    @classmethod
    def from_trajectories(
        cls, trajectories: Sequence[TensorDictBase], device: torch.device, version: int
    ) -> "LearnerBatch":
        """Pads ragged trajectories (schema keys) on the right. ``version``: of the learner's policy now."""

        def padded(key: str) -> Tensor:
            return schema.pad_stack(trajectories, key).to(device)

        def stacked(key: str) -> Tensor:
            return torch.stack([t[key] for t in trajectories]).to(device)

        batch = cls(
            tokens=padded(schema.TOKENS),
            mask=padded(schema.RESPONSE_MASK),
            sample_log_prob=padded(schema.SAMPLE_LOG_PROB),
            policy_version=padded(schema.POLICY_VERSION),
            reward=padded(schema.REWARD),
            correct=stacked(schema.CORRECT),
            truncated=stacked(schema.FINISH_REASON) == int(FinishReason.LENGTH),
            group_id=stacked(schema.GROUP_ID),
            lengths=[int(t[schema.TOKENS].shape[0]) for t in trajectories],
        )
        batch.age = torch.where(batch.mask, version - batch.policy_version, 0).long()
        return batch

    def __len__(self) -> int:
        return len(self.lengths)

    def leave_out_truncated(self) -> None:
        """Overlong filtering: what the length limit cut is in no loss."""
        self.trained = self.mask & ~self.truncated[:, None]

    @property
    def response_lengths(self) -> Tensor:
        """[N] int64, generated tokens of each response."""
        return self.mask.sum(1)
