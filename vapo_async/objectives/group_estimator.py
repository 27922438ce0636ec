"""The critic-free advantage of GRPO as a TorchRL value estimator."""

from math import prod
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor
from torch.nn.functional import pad
from torchrl.objectives import LossModule

from vapo_async.objectives.advantage import group_advantage
from vapo_async.objectives.layouts import Layout, layout_of
from vapo_async.objectives.registry import register_for_losses
from vapo_async.objectives.signals import (
    MaskedEstimator,
    check_actions_finite,
    check_batch_size,
    following,
    named_time,
    read,
    read_mask,
)


@register_for_losses("group_relative")
class GroupRelativeAdvantage(MaskedEstimator):
    """Â = (R − mean(R)) / (std(R) + ε) over the responses to one prompt (GRPO, arXiv 2402.03300); no critic.

    Reads ``("next", "reward")`` [B, T, 1], of which R is the sum over a response's actions, ``response_mask`` [B, T]
    bool, the actions, and ``group_id`` int64, equal for responses to one prompt: [B], [B, 1] or [B, T]. Writes
    ``advantage`` [B, T, 1], float32 (float64 if the reward is), 0 outside the mask, where nothing is read.

    Whole groups must be in the input; a group whose rewards are all equal gets 0. Where TorchRL's ``MCAdvantage`` does
    this while a replay buffer is filled, this works on a batch. Layouts are those of :class:`LengthAdaptiveGAE`; with
    ``segment_ids``, ``group_id`` is one per step.

    Args:
        eps: ε ≥ 0.
        device: as in every value estimator.

    Raises:
        ValueError: an entry that is missing, of the wrong shape, or not finite on an action; a row without any action;
            a response with several group ids.
        TypeError: an entry of the wrong dtype.

    Examples:
        >>> batch = GroupRelativeAdvantage()(batch)
    """

    def __init__(self, eps: float = 1e-6, *, device: torch.device | None = None) -> None:
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        super().__init__(value_network=None, device=device)
        self.eps = eps

    @classmethod
    def for_loss(cls, loss_module: LossModule, **hyperparams: Any) -> "GroupRelativeAdvantage":
        """For ``make_value_estimator``: the loss's critic is not used."""
        return cls(**hyperparams)

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        names = [following(keys.reward), keys.response_mask, keys.group_id, keys.segment_ids]
        return [name for name in names if name is not None]

    @property
    def out_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.advantage]

    @dispatch
    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
    ) -> TensorDictBase:
        """Writes the advantage into ``tensordict`` and returns it.

        Args:
            tensordict: see the class.
            params: what losses pass to estimators that have a critic; not used.
            target_params: likewise.
        """
        check_batch_size(tensordict)
        keys = self.tensor_keys
        reward_key, entry = following(keys.reward), read(tensordict, following(keys.reward))
        mask_entry = read_mask(tensordict, keys.response_mask)
        layout = layout_of(reward_key, entry, keys.response_mask, mask_entry, tensordict.ndim, named_time(tensordict))
        if prod(layout.shape[layout.steps :]) != 1:
            raise ValueError(f"expected {reward_key!r} of one number per step, [B, T, 1], got {list(layout.shape)}")
        reward = layout.rows(reward_key, entry)
        mask = torch.ones_like(reward, dtype=torch.bool)
        if mask_entry is not None:
            mask = layout.per_step(keys.response_mask, mask_entry)
        layout.check_rows(keys.response_mask, mask)
        response = self._responses(tensordict, layout, mask)
        total = torch.zeros(int(response.max()) + 1 if response.numel() else 0, dtype=torch.float64, device=mask.device)
        total = total.index_add(0, response.flatten(), torch.where(mask, reward, 0.0).double().flatten())
        if not bool(torch.isfinite(total.sum())):
            check_actions_finite(reward_key, reward, mask, layout)
        group, acting = self._groups(tensordict, layout, response, mask, len(total))
        each = torch.zeros_like(total)
        whole = torch.ones(int(acting.sum()), 1, dtype=torch.bool, device=mask.device)
        each[acting] = group_advantage(total[acting], group[acting], whole, self.eps).squeeze(1)
        dtype = torch.float64 if reward.dtype == torch.float64 else torch.float32
        tensordict.set(keys.advantage, layout.restore(torch.where(mask, each[response], 0.0).to(dtype)))
        return tensordict

    def _responses(self, tensordict: TensorDictBase, layout: Layout, mask: Tensor) -> Tensor:
        """Which response each step is in, [N, T] int64 from 0."""
        segment_key, segments = self.tensor_keys.segment_ids, None
        if segment_key is not None:
            segments = layout.per_step(segment_key, read(tensordict, segment_key, torch.int64))
        boundaries = layout.boundaries(segments)
        starts = torch.zeros_like(mask) if boundaries is None else pad(boundaries[:, :-1], (1, 0))
        starts[:, :1] = True
        return (starts.flatten().cumsum(0) - 1).reshape(mask.shape)

    def _groups(
        self, tensordict: TensorDictBase, layout: Layout, response: Tensor, mask: Tensor, responses: int
    ) -> tuple[Tensor, Tensor]:
        """Each response's group id, [responses], and whether it has an action at all (packed rows' padding has not)."""
        key = self.tensor_keys.group_id
        ids = layout.per_row_or_step(key, read(tensordict, key, torch.int64))
        ids = ids.unsqueeze(1).expand(mask.shape) if ids.ndim == 1 else ids
        group = torch.zeros(responses, dtype=torch.int64, device=mask.device)
        group[response[mask]] = ids[mask]
        acting = torch.zeros(responses, dtype=torch.bool, device=mask.device)
        acting[response[mask]] = True
        different = (mask & (group[response] != ids)).nonzero()
        if len(different):
            row, step = different[0].tolist()
            raise ValueError(f"{key!r} differs within the response of {layout.place(row, step)}: it must have one id")
        return group, acting
