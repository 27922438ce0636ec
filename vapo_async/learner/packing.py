"""Cuts a batch's rows into mini-batches of like size, and those into passes under a token budget."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate, pairwise

from vapo_async.learner.balance import shards

WORTH_PACKING = {"cpu": 0.9, "cuda": 1.0}
"""By the kind of device: packed where that leaves less than this share of the padded tokens. A CPU's calls for every
sequence cost about as much as a tenth of padding (docs/decisions.md); a GPU makes one call for all."""


class Layout(StrEnum):
    """How a pass holds several rows."""

    padded = "padded"
    """[n, longest]; rows of like length together."""
    packed = "packed"
    """[1, sum], one after another (:mod:`vapo_async.learner.packed`)."""


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


def cut(lengths: Sequence[int], max_tokens: int, layout: Layout, at_least: int = 0) -> list[list[int]]:
    """Row indices of each pass in ``layout``; :func:`bins` or :func:`microbatches`."""
    if layout is Layout.packed:
        return bins(lengths, max_tokens, at_least)
    return microbatches(lengths, max_tokens, at_least)


def pass_count(ranks: Sequence[Sequence[int]], max_tokens: int, layout: Layout) -> int:
    """The passes that the rank with the most needs; ``ranks`` holds the row lengths of each.

    Where every forward pass waits for all ranks, this is everybody's ``at_least``.
    """
    return max((len(cut(lengths, max_tokens, layout)) for lengths in ranks), default=0)


def choose_layout(ranks: Sequence[Sequence[int]], max_tokens: int, worth: float) -> Layout:
    """Packed where that is worth it, for a model that can be packed.

    Args:
        ranks: the row lengths of each.
        max_tokens: of a pass.
        worth: packed where that leaves less than this share of the tokens, padding and waiting counted; 0: never.
    """
    if worth == 0:
        return Layout.padded
    packed, padded = (_tokens_waited_for(ranks, max_tokens, layout) for layout in (Layout.packed, Layout.padded))
    return Layout.packed if packed < worth * padded else Layout.padded


def _tokens_waited_for(ranks: Sequence[Sequence[int]], max_tokens: int, layout: Layout) -> int:
    """Tokens of the largest pass of any rank, padding included, summed over the passes that all make together."""
    count = pass_count(ranks, max_tokens, layout)
    sizes = []
    for lengths in ranks:
        passes = [[lengths[row] for row in rows] for rows in cut(lengths, max_tokens, layout, count)]
        sizes.append([sum(rows) if layout is Layout.packed else len(rows) * max(rows, default=0) for rows in passes])
    return sum(map(max, zip(*sizes, strict=True)))


def microbatches(lengths: Sequence[int], max_tokens: int, at_least: int = 0) -> list[list[int]]:
    """Row indices grouped so that ``rows × longest row ≤ max_tokens``; rows of like length share one.

    A single row longer than the budget gets a micro-batch of its own. Order within the result never changes the loss:
    every denominator is global to the mini-batch. Longest rows first; ``at_least`` as for :func:`bins`.
    """
    batches: list[list[int]] = []
    for row in _longest_first(lengths, max_tokens):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return _split(batches, lengths, at_least)


def bins(lengths: Sequence[int], max_tokens: int, at_least: int = 0) -> list[list[int]]:
    """Row indices grouped so that the rows of a bin have ``max_tokens`` tokens together at most.

    A single row longer than the budget gets a bin of its own. How many there are says best-fit decreasing, which needs
    hardly more than the fewest possible; then they are filled alike where the budget allows it, so that no pass takes
    longer than the others, on this rank or, with ``at_least``, between ranks that wait for each other in every pass.

    Args:
        lengths: tokens of each row.
        max_tokens: of a bin.
        at_least: so many bins, or more where the budget needs more; a bin that there is no row for is an empty list.

    Returns:
        The bins by their longest row; longest rows first in each, too.
    """
    fitted = _best_fit(lengths, max_tokens)
    order = {row: i for i, row in enumerate(_longest_first(lengths, max_tokens))}
    alike = shards(lengths, max(1, len(fitted), at_least), float)
    if all(len(rows) <= 1 or sum(lengths[r] for r in rows) <= max_tokens for rows in alike):
        fitted = [sorted(rows, key=order.__getitem__) for rows in alike if rows]
    return _split(fitted, lengths, at_least)


def _best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Longest rows first, each where it leaves the least room."""
    result: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that still fit, bin), ascending
    for row in _longest_first(lengths, max_tokens):
        at = bisect_left(room, (lengths[row],))
        if at < len(room):
            free, index = room.pop(at)
        else:
            free, index = max_tokens, len(result)  # less than nothing is left behind a row over the budget
            result.append([])
        result[index].append(row)
        insort(room, (free - lengths[row], index))
    return result


def _longest_first(lengths: Sequence[int], max_tokens: int) -> list[int]:
    if max_tokens < 1 or any(length < 1 for length in lengths):
        raise ValueError(
            f"expected rows of at least one token and a budget of at least one, "
            f"got a shortest row of {min(lengths, default=0)} and max_tokens = {max_tokens}"
        )
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _split(batches: list[list[int]], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Halves the batch with the most tokens, one with at least two rows, until there are ``count``."""

    def tokens(rows: list[int]) -> int:
        return sum(lengths[r] for r in rows) if len(rows) > 1 else 0

    while len(batches) < count:
        fullest = max(batches, key=tokens, default=[])
        if len(fullest) < 2:
            break
        sums = list(accumulate(lengths[r] for r in fullest))
        first = 1 + min(range(len(fullest) - 1), key=lambda i: abs(2 * sums[i] - sums[-1]))
        batches.remove(fullest)
        batches += [fullest[:first], fullest[first:]]
    batches.sort(key=lambda rows: (-lengths[rows[0]], rows[0]))
    return batches + [[] for _ in range(count - len(batches))]
