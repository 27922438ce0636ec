"""Cuts rows into micro-batches under a budget of padded tokens."""

from collections.abc import Sequence


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
