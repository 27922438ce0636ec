"""Cuts a batch's rows into mini-batches of like size, and those into micro-batches under a budget of padded tokens."""

from collections.abc import Sequence
from itertools import pairwise


def minibatches(order: Sequence[int], count: int) -> list[list[int]]:
    """``order`` cut into ``count`` parts whose sizes differ by one at most, the larger ones first.

    Fewer rows than parts: one part per row.
    """
    if not order:
        return []
    count = min(count, len(order))
    size, larger = divmod(len(order), count)
    ends = [size * i + min(i, larger) for i in range(count + 1)]
    return [list(order[start:end]) for start, end in pairwise(ends)]


def microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices grouped so that ``rows × longest row ≤ max_tokens``; rows of like length share one.

    A single row longer than the budget gets a micro-batch of its own. Order within the result never changes the loss:
    every denominator is global to the mini-batch.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
