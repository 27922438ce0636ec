"""What the loss reads from its input: one number per step, checked, with errors that name the key."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModule
from torch import Tensor

from vapo_async.objectives.checks import check_boolean

Key: TypeAlias = NestedKey | list[NestedKey]


@dataclass
class VAPOKeys:
    """Keys of the input, changed by ``set_keys``.

    With ``response_mask=None`` every step is an action. ``segment_ids`` (None = rows are not packed) tells the
    responses of a packed row apart; ``group_id`` those of one prompt, for group-relative advantages.
    """

    advantage: NestedKey = "advantage"
    value_target: NestedKey = "value_target"
    value: NestedKey = "state_value"
    sample_log_prob: Key = "sample_log_prob"
    prox_log_prob: NestedKey = "prox_log_prob"
    ref_log_prob: NestedKey = "ref_log_prob"
    action: Key = "action"
    response_mask: NestedKey | None = "response_mask"
    correct: NestedKey = "correct"
    policy_age: NestedKey = "policy_age"
    keep: NestedKey = "keep"
    reward: NestedKey = "reward"
    done: NestedKey = "done"
    terminated: NestedKey = "terminated"
    segment_ids: NestedKey | None = None
    group_id: NestedKey = "group_id"


@dataclass(frozen=True)
class StepInputs:
    """The entries of one batch, each as [N] or [B, T], whatever the log-probs are; a last dimension of 1 is dropped.

    Shapes are always checked, values only on a CPU: on a GPU the host would have to wait for them.
    """

    tensordict: TensorDictBase
    like: Tensor
    """The log-probs: what gives shape and device."""

    def required(self, name: str, key: Key, mask: Tensor | None = None) -> Tensor:
        """The entry ``key``, of which ``set_keys`` speaks as ``name``.

        A list of keys, as composite actions have, is the sum of its entries and their features. ``ValueError`` where
        it is missing, of another shape, or not finite under ``mask``.
        """
        keys = key if isinstance(key, list) else [key]
        entries = []
        for k in keys:
            entry = self.tensordict.get(k, None)
            if entry is None:
                way_out = f"add it, or name another entry with set_keys({name}=...)"
                if name == "response_mask":
                    way_out += "; with set_keys(response_mask=None) every step is an action"
                raise ValueError(f"the input has no '{k}': {way_out}")
            entries.append(self._features(entry) if len(keys) > 1 else self.per_step(k, entry))
        entry = torch.stack(entries).sum(0) if len(keys) > 1 else entries[0]
        if mask is not None and entry.device.type == "cpu":
            bad = mask & ~entry.isfinite()
            if bool(bad.any()):
                raise ValueError(f"'{key}' is NaN or infinite on steps that count, in {_rows(bad)} of {len(mask)}")
        return entry

    def optional(self, key: NestedKey) -> Tensor | None:
        """The entry, or None where there is none."""
        entry = self.tensordict.get(key, None)
        return None if entry is None else self.per_step(key, entry)

    def per_step(self, key: NestedKey, entry: Tensor) -> Tensor:
        """``entry`` in the shape of the log-probs; ``ValueError`` where it has another."""
        shape = self.like.shape
        if entry.shape == (*shape, 1):
            return entry.squeeze(-1)
        if entry.shape != shape:
            raise ValueError(
                f"expected '{key}' of shape {list(shape)} or {[*shape, 1]}, as the log-probs, got {list(entry.shape)}"
            )
        return entry

    def mask(self, key: NestedKey | None, others: tuple[NestedKey, ...]) -> Tensor:
        """The steps that count, bool: those of ``key`` (None = all) which no entry of ``others`` excludes."""
        if key is None:
            mask = torch.ones_like(self.like, dtype=torch.bool)
        else:
            mask = self.required("response_mask", key)
            check_boolean(**{str(key): mask})
        for other in others:
            valid = self.optional(other)
            if valid is not None:
                check_boolean(**{str(other): valid})
            mask = mask if valid is None else mask & valid
        if mask.ndim == 2 and mask.shape[1] > 1 and mask.device.type == "cpu":
            empty = ~mask.any(1, keepdim=True)
            if bool(empty.any()):
                raise ValueError(f"'{key}' leaves nothing of {_rows(empty)} of {len(mask)}: take such rows out")
        return mask

    def age(self, key: NestedKey, mask: Tensor) -> Tensor:
        """The ages; ``ValueError`` also for a negative one under the mask."""
        age = self.required("policy_age", key, mask)
        if age.device.type == "cpu":
            bad = mask & (age < 0)
            if bool(bad.any()):
                raise ValueError(
                    f"'{key}' is negative on steps that count, in {_rows(bad)} of {len(mask)}: "
                    "give the versions from sampling to now, >= 0"
                )
        return age

    def correct(self, key: NestedKey) -> Tensor:
        """The verdicts, bool, one per step: from an entry per step, or one per row, [B] or [B, 1]."""
        entry = self.tensordict.get(key, None)
        if entry is None:
            raise ValueError(
                f"the input has no '{key}', which nll_coeff needs, bool [B] or [B, T]: add it, name another entry with "
                "set_keys(correct=...), or switch the term off with nll_coeff=None"
            )
        check_boolean(**{str(key): entry})
        if self.like.ndim == 2 and entry.shape in ((len(self.like),), (len(self.like), 1)):
            return entry.reshape(-1, 1).expand_as(self.like)
        return self.per_step(key, entry)

    def _features(self, entry: Tensor) -> Tensor:
        return entry.reshape(*entry.shape[: self.like.ndim], -1).sum(-1)


def step_mask(tensordict: TensorDictBase, shape: torch.Size, keys: VAPOKeys, others: tuple[NestedKey, ...]) -> Tensor:
    """:meth:`StepInputs.mask` of steps of a known shape before their log-probs; ``ValueError`` for a missing action."""
    actions = keys.action if isinstance(keys.action, list) else [keys.action]
    for action in actions:
        if tensordict.get(action, None) is None:
            raise ValueError(f"the input has no '{action}': add it, or name another entry with set_keys(action=...)")
    like = torch.empty(shape, device=tensordict.get(actions[0]).device)
    return StepInputs(tensordict, like).mask(keys.response_mask, others)


def value_of(critic: TensorDictModule, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """What the critic writes as ``key``; ``ValueError`` where it writes others only: an old entry may be there."""
    if unravel_key(key) not in [unravel_key(written) for written in critic.out_keys]:
        raise ValueError(f"the critic writes {critic.out_keys}, not '{key}': set_keys(value=...)")
    return critic(tensordict).get(key)


def _rows(bad: Tensor) -> str:
    """``row 3``, or ``rows 0, 2, 5`` (at most five)."""
    rows = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
    names = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"row {names}" if len(rows) == 1 else f"rows {names}"
