"""Who takes part in a broadcast of weights, and what is sent: plain data that travels to learner and engines.

Rank 0 is the learner; each engine has as many ranks as processes, in the order of the owners' names. The group is made
anew whenever the set of engines has changed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Group:
    """Learner and engines, and where they meet."""

    host: str
    port: int
    owners: tuple[str, ...]
    """Rollout workers by name."""
    ranks_per_engine: int

    @property
    def world_size(self) -> int:
        return 1 + len(self.owners) * self.ranks_per_engine

    def first_rank(self, owner: str) -> int:
        """Of the engine of a rollout worker.

        Raises:
            ValueError: it is no member.
        """
        return 1 + self.owners.index(owner) * self.ranks_per_engine


def fits(group: Group | None, owners: Iterable[str]) -> bool:
    """Whether the group is exactly that of these rollout workers."""
    return group is not None and group.owners == members(owners)


def members(owners: Iterable[str]) -> tuple[str, ...]:
    """The order of rollout workers in a group."""
    return tuple(sorted(owners))


@dataclass(frozen=True)
class Layout:
    """What is sent, one after the other."""

    names: list[str]
    dtypes: list[str]
    """Torch's names."""
    shapes: list[list[int]]

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> "Layout":
        """All parameters in their order, tied ones once."""
        of_all = str(dtype).removeprefix("torch.")
        return cls(list(shapes), [of_all] * len(shapes), [list(shape) for shape in shapes.values()])


@dataclass(frozen=True)
class Broadcast:
    """An engine's part in one publication."""

    group: Group
    owner: str
    layout: Layout

    def join(self) -> dict[str, Any]:
        """What the engine's end of the transfer joins the group with."""
        group = self.group
        first_rank = group.first_rank(self.owner)
        return {"host": group.host, "port": group.port, "first_rank": first_rank, "world_size": group.world_size}

    def update(self) -> dict[str, Any]:
        """What it receives the weights with."""
        return {"names": self.layout.names, "dtypes": self.layout.dtypes, "shapes": self.layout.shapes}
