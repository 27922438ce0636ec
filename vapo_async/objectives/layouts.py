"""How entries of a TensorDict lie in memory: padded [*B, T, *F] or jagged, both read as rows [N, T] of one time each.

N counts the batch dimensions and the features: the entries of a row share one past and one future. A jagged entry is a
single row, of all its responses one after another. Packed rows stay as they are: their segments only say where
trajectories end. Views wherever the layout allows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from tensordict import NestedKey
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
"""Flags that are counted at a time; fits in uint8."""


@dataclass(frozen=True)
class Layout:
    """Where time, batch and features are in the entries of one TensorDict.

    ``shape``: of the value's (or reward's) dense tensor; ``time``: its dimension of time; ``steps``: how many leading
    dimensions an entry of one number per step has, [*B, T] in any order; ``offsets``: [responses + 1] of a jagged
    layout, whose dense tensor is [ΣT, *F].
    """

    shape: tuple[int, ...]
    time: int
    steps: int
    offsets: Tensor | None = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Of an entry that has one number per row of the batch."""
        if self.offsets is not None:
            return (len(self.offsets) - 1,)
        return tuple(size for dim, size in enumerate(self.shape[: self.steps]) if dim != self.time)

    def rows(self, key: NestedKey, entry: Tensor) -> Tensor:
        """An entry of one number per step and feature as [N, T]."""
        dense = self._dense(key, entry)
        if tuple(dense.shape) != self.shape:
            raise ValueError(
                f"expected {key!r} of shape {list(self.shape)} like the other entries, got {_shape(dense)}"
            )
        return self._folded(dense)

    def per_step(self, key: NestedKey | None, entry: Tensor) -> Tensor:
        """An entry of one number per step, [*B, T] or [*B, T, 1], as [N, T]: the same for all features."""
        dense = self._dense(key, entry)
        steps, shape = self.shape[: self.steps], tuple(dense.shape)
        if shape == (*steps, 1):
            dense = dense.squeeze(-1)
        elif shape not in (steps, self.shape):
            raise ValueError(f"expected {key!r} of shape {list(steps)} or {[*steps, 1]}, got {_shape(dense)}")
        if tuple(dense.shape) != self.shape:
            dense = dense.reshape(*steps, *[1] * (len(self.shape) - self.steps)).expand(self.shape)
        return self._folded(dense)

    def per_row_or_step(self, key: NestedKey, entry: Tensor) -> Tensor:
        """An entry of one number per row, [*B] or [*B, 1], as [N] (jagged: [N, T]), or of one per step as [N, T]."""
        batch, features = self.batch_shape, prod(self.shape[self.steps :])
        if not entry.is_nested and tuple(entry.shape) in (batch, (*batch, 1)):
            if self.offsets is None:
                return entry.reshape(-1).repeat_interleave(features)
            each = entry.reshape(-1).repeat_interleave(self.offsets.diff(), output_size=self.shape[0])
            return each.expand(features, -1)
        steps = self.shape[: self.steps]
        if tuple(self._dense(key, entry).shape) in (steps, (*steps, 1), self.shape):
            return self.per_step(key, entry)
        raise ValueError(
            f"expected {key!r} of one number per row, {list(batch)} or {[*batch, 1]}, or per step, {list(steps)} or "
            f"{[*steps, 1]}, got {_shape(entry)}"
        )

    def restore(self, rows: Tensor) -> Tensor:
        """Rows [N, T] as an entry of this layout."""
        dense = rows.reshape(*self._others, self.shape[self.time]).movedim(-1, self.time)
        if self.offsets is None:
            return dense
        return torch.nested.nested_tensor_from_jagged(dense, offsets=self.offsets)

    def place(self, row: int, step: int) -> str:
        """What the user calls entry [row, step] of :meth:`rows`."""
        if self.offsets is not None:
            response = int(torch.searchsorted(self.offsets, step, right=True)) - 1
            return f"row {response}, step {step - int(self.offsets[response])}"
        index = _unravel(row // prod(self.shape[self.steps :]), self.batch_shape)
        return f"row {index}, step {step}"

    def boundaries(self, segment_ids: Tensor | None) -> Tensor | None:
        """[N, T] bool, True before another response or another segment ([N, T]) begins; None where rows are whole."""
        found = None
        if segment_ids is not None:
            found = pad(segment_ids[:, 1:] != segment_ids[:, :-1], (0, 1))
        if self.offsets is not None:
            last = self.offsets[1:-1] - 1
            edges = torch.zeros(self.shape[0], dtype=torch.bool, device=self.offsets.device)
            edges[last[last >= 0]] = True
            found = edges.expand(prod(self.shape[1:]), -1) if found is None else found | edges
        return found

    def check_rows(self, key: NestedKey | None, mask: Tensor) -> Tensor | None:
        """The masked steps of each row, [N] (None if jagged); ``ValueError`` with the rows that have none."""
        if self.offsets is None:
            counts = _blocked(mask).sum(2, dtype=torch.uint8).sum(1)
            empty, batch, features = counts == 0, self.batch_shape, prod(self.shape[self.steps :])
        else:
            sums = pad(mask[0].cumsum(0), (1, 0))
            counts = None
            empty, batch, features = sums[self.offsets[1:]] == sums[self.offsets[:-1]], self.batch_shape, 1
        if bool(empty.any()):
            names = dict.fromkeys(str(_unravel(row // features, batch)) for row in empty.nonzero().flatten().tolist())
            raise ValueError(f"{key!r} has no True step in row {', '.join(names)}: drop rows without any action")
        return counts

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(size for dim, size in enumerate(self.shape) if dim != self.time)

    def _folded(self, dense: Tensor) -> Tensor:
        return dense.movedim(self.time, -1).reshape(prod(self._others), self.shape[self.time])

    def _dense(self, key: NestedKey | None, entry: Tensor) -> Tensor:
        if entry.is_nested != (self.offsets is not None):
            found, expected = ("jagged", "padded") if entry.is_nested else ("padded", "jagged")
            raise ValueError(f"expected {key!r} to be {expected} like the other entries, got a {found} one")
        if self.offsets is None:
            return entry
        values, offsets = jagged_parts(key, entry)
        if offsets is not self.offsets and not torch.equal(offsets, self.offsets):
            raise ValueError(
                f"expected {key!r} with the row lengths of the other entries, {self.offsets.diff().tolist()}, "
                f"got {offsets.diff().tolist()}"
            )
        return values


def layout_of(
    key: NestedKey,
    entry: Tensor,
    mask_key: NestedKey | None,
    mask: Tensor | None,
    batch_dims: int,
    time_dim: int | None,
) -> Layout:
    """The layout of a TensorDict with ``batch_dims`` dimensions from one of its full entries and its mask.

    As in ``GAE``, time is ``time_dim`` (negative: counted in the TensorDict's batch dimensions) or the last batch
    dimension. But the mask, [*B, T], says more than the batch size, and what neither settles is an error.
    """
    if entry.is_nested:
        values, offsets = jagged_parts(key, entry)
        return Layout(tuple(values.shape), 0, 1, offsets)
    shape = tuple(entry.shape)
    if mask is None:
        return Layout(shape, *_time_without_mask(key, shape, batch_dims, time_dim))
    if mask.is_nested:
        raise ValueError(f"expected {key!r} to be jagged like {mask_key!r}, got a padded one of shape {list(shape)}")
    return Layout(shape, *_time_with_mask(key, shape, mask_key, tuple(mask.shape), batch_dims, time_dim))


def trajectory_ends(mask: Tensor, done: Tensor | None, boundaries: Tensor | None) -> Tensor | None:
    """The last action of each trajectory, for rows that may hold several; None where no row does.

    Args:
        mask: [N, T] bool, the actions.
        done: [N, T] bool, may be set outside the mask, where it means nothing before the first and after the last
            action; None = never.
        boundaries: of :meth:`Layout.boundaries`.

    Returns:
        [N, T] bool, True on actions only; or None.
    """
    if boundaries is None:
        if done is None or not mask.numel() or _one_per_row(mask, done):
            return None
        cuts = done
    else:
        cuts = boundaries if done is None else boundaries | done
    if not bool((cuts & ~mask).any()):
        return cuts
    trajectory = pad(cuts[:, :-1], (1, 0)).cumsum(1)
    after = torch.where(mask, trajectory, mask.shape[1] + 1).flip(1).cummin(1).values.flip(1)
    return mask & (pad(after[:, 1:], (0, 1), value=mask.shape[1] + 1) > trajectory)


def jagged_parts(key: NestedKey | None, entry: Tensor) -> tuple[Tensor, Tensor]:
    """Values [ΣT, *F] and offsets [B + 1] of a jagged entry, ragged in its second dimension."""
    if entry.layout is not torch.jagged or not isinstance(entry.shape[1], torch.SymInt):
        raise ValueError(
            f"expected {key!r} as a jagged nested tensor [B, jagged, ...], got {entry.layout} {_shape(entry)}"
        )
    entry = entry.contiguous()
    return entry.values(), entry.offsets()


def _one_per_row(mask: Tensor, done: Tensor) -> bool:
    """Whether no action follows a ``done`` in its row."""
    first, last = _outermost(done, last=False), _outermost(mask, last=True)
    return bool(((first >= last) | ~done.gather(1, first)).all())


def _outermost(flags: Tensor, last: bool) -> Tensor:
    """Place of the first or last True of each row, [N, 1]; some place in rows without any."""
    blocks = _blocked(flags)

    def find(counts: Tensor) -> Tensor:
        found = (counts.flip(1) if last else counts).ne(0).view(torch.uint8).argmax(1, keepdim=True)
        return counts.shape[1] - 1 - found if last else found

    block = find(blocks.sum(2, dtype=torch.uint8))
    inside = find(blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1))
    return (block * BLOCK + inside).clamp_max(flags.shape[1] - 1)


def _blocked(flags: Tensor) -> Tensor:
    """[N, T] bool as [N, blocks, BLOCK] uint8, whose sums over blocks stay uint8: many times faster than bool's."""
    rows, steps = flags.shape
    blocks = -(-steps // BLOCK)
    flags = flags if steps == blocks * BLOCK else pad(flags, (0, blocks * BLOCK - steps))
    return flags.view(torch.uint8).reshape(rows, blocks, BLOCK)


def _time_with_mask(
    key: NestedKey,
    shape: tuple[int, ...],
    mask_key: NestedKey | None,
    mask: tuple[int, ...],
    batch_dims: int,
    time_dim: int | None,
) -> tuple[int, int]:
    """Dimension of time and number of the mask's dimensions without a trailing 1."""
    ndim = len(shape)
    steps = len(mask) - (len(mask) == ndim > 1 and mask[-1] == 1 and time_dim != ndim - 1)
    if mask[:steps] != shape[:steps] or len(mask) > ndim:
        raise ValueError(
            f"expected {mask_key!r} of shape [*B, T] for {key!r} {list(shape)}, got {list(mask)}: one flag per step"
        )
    if time_dim is not None:
        if time_dim < 0 and steps > batch_dims:
            raise _unclear(key, shape, batch_dims)
        return _counted(time_dim, batch_dims, steps), steps
    missing_feature = steps == ndim > 2 and steps > batch_dims > 0  # [B, T, F] or [B1, B2, T]
    one_row = steps == 1 and (len(mask) > 1 or ndim > 2)  # [T, 1] or [B, T]; a flag per row or per step
    if missing_feature or one_row or steps < batch_dims:
        raise _unclear(key, shape, batch_dims)
    return steps - 1, steps


def _time_without_mask(
    key: NestedKey, shape: tuple[int, ...], batch_dims: int, time_dim: int | None
) -> tuple[int, int]:
    """As :func:`_time_with_mask`, from the batch size alone."""
    ndim = len(shape)
    if time_dim is not None and (time_dim >= 0 or ndim <= batch_dims + 1):
        return (time := _counted(time_dim, batch_dims, ndim)), max(batch_dims, time + 1)
    flat = ndim == 2 and batch_dims == 1 and shape[-1] != 1  # [B, T] or [T, F]
    bare = ndim == batch_dims > 1 and shape[-1] == 1  # [B, T, 1] or [B1, B2, T]
    if ndim > batch_dims + 1 or flat or bare:
        raise _unclear(key, shape, batch_dims)
    return batch_dims - 1, batch_dims


def _counted(time_dim: int, batch_dims: int, ndim: int) -> int:
    time = time_dim + batch_dims if time_dim < 0 else time_dim
    if not 0 <= time < ndim:
        raise ValueError(f"time_dim {time_dim} is out of range for a batch of {batch_dims} dimensions")
    return time


def _unclear(key: NestedKey, shape: tuple[int, ...], batch_dims: int) -> ValueError:
    return ValueError(
        f"which dimension of {key!r} {list(shape)} is time is not clear from a TensorDict of {batch_dims} batch "
        "dimensions: give it the batch size [*B, T] and a mask [*B, T], or set time_dim to 0 or a positive number"
    )


def _unravel(row: int, batch: Sequence[int]) -> int | tuple[int, ...]:
    """Index of a row in the batch, a plain number where that has one dimension."""
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), tuple(batch))) if batch else (0,)
    return index[0] if len(index) == 1 else index


def _shape(entry: Tensor) -> str:
    return str(list(entry.shape))
