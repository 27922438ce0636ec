"""What advantages are computed from: the names of the entries, how they are read and checked."""

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.objectives.value import GAE, ValueEstimatorBase

from vapo_async.objectives.layouts import Layout, layout_of, trajectory_ends


@dataclass
class EstimatorKeys(GAE._AcceptedKeys):
    """Names of the entries; ``response_mask`` None: every step is an action; ``segment_ids`` None: rows not packed."""

    # Repeated, as ``set_keys`` only knows the fields that the class itself spells.
    advantage: NestedKey = "advantage"
    value_target: NestedKey = "value_target"
    value: NestedKey = "state_value"
    reward: NestedKey = "reward"
    done: NestedKey = "done"
    terminated: NestedKey = "terminated"
    steps_to_next_obs: NestedKey = "steps_to_next_obs"
    sample_log_prob: NestedKey | None = "sample_log_prob"
    prox_log_prob: NestedKey = "prox_log_prob"
    response_mask: NestedKey | None = "response_mask"
    segment_ids: NestedKey | None = None
    group_id: NestedKey = "group_id"


class MaskedEstimator(ValueEstimatorBase):
    """A value estimator with these keys."""

    _AcceptedKeys = EstimatorKeys
    default_keys = EstimatorKeys

    def set_keys(self, **kwargs: NestedKey | None) -> None:
        """Renames entries; ``response_mask=None`` makes every step an action, ``segment_ids=None`` rows unpacked."""
        off = [name for name in ("response_mask", "segment_ids") if name in kwargs and kwargs[name] is None]
        super().set_keys(**{name: key for name, key in kwargs.items() if name not in off})
        for name in off:
            setattr(self.tensor_keys, name, None)


@dataclass(frozen=True)
class Signals:
    """Rows [N, T] of a batch, see :mod:`vapo_async.objectives.layouts`.

    ``mask``: the actions; ``ends``: the last action of each trajectory, None where every row is one; ``row_lengths``
    [N]: actions per row, None if jagged; ``next_value``: 0 after terminal actions; ``log_probs``: of the behaviour and
    of the current policy, empty where not asked for.
    """

    layout: Layout
    mask: Tensor
    ends: Tensor | None
    row_lengths: Tensor | None
    value: Tensor
    next_value: Tensor
    reward: Tensor
    log_probs: tuple[Tensor, ...]


def read_signals(
    tensordict: TensorDictBase,
    keys: EstimatorKeys,
    *,
    time_dim: int | None,
    valid: Tensor | None = None,
    log_probs: bool = False,
) -> Signals:
    """Reads values, rewards and ends; what they may look like says :class:`LengthAdaptiveGAE`.

    Args:
        tensordict: values included.
        keys: of the entries.
        time_dim: the TensorDict's dimension of time; None = the one named "time", or as the mask and batch size say.
        valid: [*B, T] bool, the steps that count; None = all.
        log_probs: whether those for V-trace are read.
    """
    no_value = "add it, or pass value_network to the estimator"
    value = read(tensordict, keys.value, way_out=no_value)
    mask = read_mask(tensordict, keys.response_mask)
    layout = layout_of(keys.value, value, keys.response_mask, mask, tensordict.ndim, time_dim)

    def rows(key: NestedKey, dtype: torch.dtype | None = None) -> Tensor:
        return layout.rows(key, read(tensordict, key, dtype))

    next_value = layout.rows(following(keys.value), read(tensordict, following(keys.value), way_out=no_value))
    done = rows(following(keys.done), torch.bool)
    has_terminated = tensordict.get(following(keys.terminated), None) is not None
    terminated = rows(following(keys.terminated), torch.bool) if has_terminated else done
    actions = torch.ones_like(done) if mask is None else layout.per_step(keys.response_mask, mask)
    if valid is not None:
        actions = actions & layout.per_step("shifted_valid", valid)
    segment_ids = None
    if keys.segment_ids is not None:
        segment_ids = layout.per_step(keys.segment_ids, read(tensordict, keys.segment_ids, torch.int64))
    policies = (keys.sample_log_prob, keys.prox_log_prob) if log_probs else ()
    return Signals(
        layout=layout,
        mask=actions,
        ends=trajectory_ends(actions, done, layout.boundaries(segment_ids)),
        row_lengths=layout.check_rows(keys.response_mask, actions),
        value=layout.rows(keys.value, value),
        next_value=torch.where(terminated, 0.0, next_value),
        reward=rows(following(keys.reward)),
        log_probs=tuple(layout.per_step(key, read(tensordict, key)) for key in policies),
    )


def check_batch_size(tensordict: TensorDictBase) -> None:
    """``ValueError`` for a ragged batch dimension, as of a lazy stack, whose entries cannot be read or written."""
    if -1 in tensordict.batch_size:
        raise ValueError(
            f"the input has the ragged batch size {list(tensordict.batch_size)}: pad it, or make it jagged, "
            f"tensordict.densify(layout=torch.jagged), and set its batch_size to {list(tensordict.batch_size[:1])}"
        )


def check_finite(total: Tensor, signals: Signals, keys: EstimatorKeys) -> None:
    """Names the first action whose input is not finite, if ``total``, a sum over all results, is not; else is cheap."""
    if bool(torch.isfinite(total)):
        return
    entries = {keys.value: signals.value, following(keys.value): signals.next_value}
    entries |= {following(keys.reward): signals.reward}
    entries |= dict(zip((keys.sample_log_prob, keys.prox_log_prob), signals.log_probs, strict=False))
    for key, entry in entries.items():
        check_actions_finite(key, entry, signals.mask, signals.layout)


def check_actions_finite(key: NestedKey, entry: Tensor, mask: Tensor, layout: Layout) -> None:
    """``ValueError`` with the first action on which ``entry`` is NaN or infinite. Rows [N, T]."""
    wrong = (mask & ~entry.isfinite()).nonzero()
    if len(wrong):
        row, step = wrong[0].tolist()
        raise ValueError(
            f"expected finite {key!r} on actions, got {float(entry[row, step])} at {layout.place(row, step)}"
        )


def read(
    tensordict: TensorDictBase,
    key: NestedKey,
    dtype: torch.dtype | None = None,
    way_out: str = "add it, or name another entry with set_keys",
) -> Tensor:
    """An entry of ``dtype``; None = of any floating one."""
    entry: Tensor | None = tensordict.get(key, None)
    if entry is None:
        raise ValueError(f"the input has no {key!r}: {way_out}")
    if not (entry.is_floating_point() if dtype is None else entry.dtype == dtype):
        raise TypeError(f"expected {key!r} of dtype {dtype or 'floating'}, got {entry.dtype}")
    return entry


def read_mask(tensordict: TensorDictBase, key: NestedKey | None) -> Tensor | None:
    """The mask of actions; None where there is none."""
    if key is None:
        return None
    way_out = "add it, bool, True on actions, or set_keys(response_mask=None) if every step is an action"
    return read(tensordict, key, torch.bool, way_out)


def named_time(tensordict: TensorDictBase) -> int | None:
    """The batch dimension that is named "time"."""
    return tensordict.names.index("time") if "time" in tensordict.names else None


def following(key: NestedKey) -> tuple[str, ...]:
    """The key of the same entry one step later."""
    return ("next", key) if isinstance(key, str) else ("next", *key)
