"""Deals a mini-batch's rows out to ranks so that all of them work for about as long."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderCost:
    """FLOP of one sequence's forward pass through a decoder: ``linear · l + quadratic · l²`` for l tokens.

    The backward pass takes twice that, so the ratio between two sequences is the same with it.
    """

    linear: float
    """FLOP per token: the weights' matrix products."""
    quadratic: float
    """FLOP per token²: causal attention."""

    @classmethod
    def of(cls, *, parameters: int, layers: int, attention_width: int) -> "DecoderCost":
        """2·P FLOP per token, and 2·l·w per token and layer: half of arXiv 2204.02311, appendix B, as it is causal.

        Args:
            parameters: P, those that are multiplied with; an input embedding that is not also the output's is looked
                up and does not count.
            layers: with attention.
            attention_width: w, query heads × head size; mostly the hidden size.
        """
        return cls(linear=2.0 * parameters, quadratic=2.0 * layers * attention_width)

    def __call__(self, length: int) -> float:
        return self.linear * length + self.quadratic * length * length


def shards(lengths: Sequence[int], ranks: int, cost: Callable[[int], float]) -> list[list[int]]:
    """Row indices for each rank, ascending; every row once, every rank at least one where there are as many rows.

    The dearest row first, each to the rank with the least so far (Graham, 1969). No rank then has more than the mean
    plus one row; a row that costs more than the mean keeps its rank busy for longer than the others however the rest
    is dealt out.

    Args:
        lengths: tokens of each row.
        ranks: at least 1.
        cost: of a row with so many tokens, positive; :class:`DecoderCost`.

    Raises:
        ValueError: no rank, or a row that costs nothing.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    costs = [cost(length) for length in lengths]
    if any(not c > 0 for c in costs):
        row = next(i for i, c in enumerate(costs) if not c > 0)
        raise ValueError(f"cost must be positive, got {costs[row]} for row {row} of {lengths[row]} tokens")
    loads = [(0.0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        dealt[rank].append(row)
        heapq.heapreplace(loads, (load + costs[row], rank))
    return [sorted(rows) for rows in dealt]
