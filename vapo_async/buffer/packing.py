"""Groups as a few flat tensors: what a checkpoint holds instead of thousands of small ones."""

from collections.abc import Mapping, Sequence

import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase
from torch import Tensor

from vapo_async.schema import (
    PER_TOKEN_KEYS,
    TOKENS,
    TRAJECTORY_DTYPES,
    stack_group,
)

_LENGTH = "length"  # [N] int64, tokens of each trajectory


def pack_groups(groups: Sequence[TensorDictBase]) -> dict[str, Tensor]:
    """The schema's keys of all trajectories: per-token ones end to end [sum of L], the others [N], and lengths [N]."""
    trajectories = [trajectory for group in groups for trajectory in group.unbind(0)]
    packed = {_LENGTH: torch.tensor([len(trajectory[TOKENS]) for trajectory in trajectories], dtype=torch.int64)}
    for key, dtype in TRAJECTORY_DTYPES.items():
        values = [trajectory[key].reshape(-1) for trajectory in trajectories]
        packed[key] = torch.cat(values) if values else torch.zeros(0, dtype=dtype)
    return packed


def unpack_groups(packed: Mapping[str, Tensor], group_size: int) -> list[LazyStackedTensorDict]:
    """The reverse of :func:`pack_groups`, bit for bit; no tensor shares its memory with another.

    A key that is not in ``packed`` is not in the trajectories either: the schema's check finds it.
    """
    lengths = packed[_LENGTH].tolist()
    columns: dict[str, list[Tensor]] = {}
    for key in TRAJECTORY_DTYPES:
        if key in packed:
            rows = packed[key].split(lengths) if key in PER_TOKEN_KEYS else packed[key].unbind(0)
            columns[key] = [row.clone() for row in rows]
    trajectories = [TensorDict({key: column[i] for key, column in columns.items()}) for i in range(len(lengths))]
    return [stack_group(trajectories[i : i + group_size]) for i in range(0, len(trajectories), group_size)]
