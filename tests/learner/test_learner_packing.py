"""Passes under a token budget: by hand, against the fewest possible, and on long-tailed lengths."""

import math
import time

import pytest
from bench.lengths import long_tailed
from hypothesis import given, settings
from hypothesis import strategies as st

from vapo_async.learner.balance import DecoderCost, shards
from vapo_async.learner.packing import Layout, bins, choose_layout, cut, microbatches, pass_count

layouts = pytest.mark.parametrize("layout", list(Layout))
some_rows = st.lists(st.integers(1, 60), max_size=25)


def use(lengths: list[int], max_tokens: int) -> float:
    """Share of the bins' budget that holds tokens."""
    return sum(lengths) / (len(bins(lengths, max_tokens)) * max_tokens)


def fewest_bins(lengths: list[int], max_tokens: int) -> int:
    """By trying everything."""

    def place(left: list[int], room: list[int], best: int) -> int:
        if len(room) >= best:
            return best
        if not left:
            return len(room)
        for i, free in enumerate(room):
            if left[0] <= free and free not in room[:i]:
                best = place(left[1:], [*room[:i], free - left[0], *room[i + 1 :]], best)
        return place(left[1:], [*room, max_tokens - left[0]], best)

    return place(sorted(lengths, reverse=True), [], len(lengths) + 1)


def test_bins_by_hand() -> None:
    assert bins([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert bins([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
    assert bins([9, 6, 5, 4, 3, 2], 10) == [[0], [1, 3], [2, 4, 5]]  # two full ones; where most room is, it takes four
    assert bins([5, 7, 2, 3], 10) == [[1, 2], [0, 3]]  # 9 and 8 rather than 10 and 7
    assert bins([4, 25, 6, 12], 10) == [[1], [3], [2, 0]]  # 25 and 12 are over the budget: each alone
    assert bins([3], 10) == [[0]]
    assert bins([], 10) == []


def test_at_least_so_many_by_hand() -> None:
    assert bins([6, 5, 4, 3, 2], 10, at_least=2) == [[0, 2], [1, 3, 4]]
    assert bins([6, 5, 4, 3, 2], 10, at_least=3) == [[0], [1, 4], [2, 3]]
    assert bins([6, 5], 10, at_least=4) == [[0], [1], [], []]
    assert bins([], 10, at_least=2) == [[], []]
    assert microbatches([1, 1, 1, 1, 4], 4, at_least=2) == [[4], [0, 1, 2, 3]]
    assert microbatches([1, 1, 1, 1, 4], 4, at_least=4) == [[4], [0], [1], [2, 3]]
    assert microbatches([4, 3, 2, 1], 16, at_least=2) == [[0], [1, 2, 3]]  # 4 and 6 tokens rather than 7 and 3
    assert microbatches([3, 3, 3, 3], 16, at_least=2) == [[0, 1], [2, 3]]
    assert microbatches([6, 5], 12, at_least=4) == [[0], [1], [], []]


def test_missing_passes_are_lists_of_their_own() -> None:
    first, second = bins([], 10, at_least=2)
    first.append(0)
    assert second == []


@layouts
@settings(deadline=None)
@given(lengths=some_rows, max_tokens=st.integers(1, 80), at_least=st.integers(0, 12))
def test_every_row_once_within_the_budget(layout: Layout, lengths: list[int], max_tokens: int, at_least: int) -> None:
    result = cut(lengths, max_tokens, layout, at_least)
    assert sorted(row for rows in result for row in rows) == list(range(len(lengths)))
    assert len(result) == max(at_least, len(cut(lengths, max_tokens, layout)))
    filled = [rows for rows in result if rows]
    assert len(filled) == min(len(lengths), len(result))  # a pass stays empty only where there is no row to give it
    assert result[: len(filled)] == filled
    for rows in filled:
        assert [lengths[row] for row in rows] == sorted((lengths[row] for row in rows), reverse=True)
        width = len(rows) * lengths[rows[0]] if layout is Layout.padded else sum(lengths[row] for row in rows)
        assert width <= max_tokens or len(rows) == 1
    assert [lengths[rows[0]] for rows in filled] == sorted((lengths[rows[0]] for rows in filled), reverse=True)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9), max_tokens=st.integers(20, 40))
def test_bins_are_nearly_the_fewest_possible(lengths: list[int], max_tokens: int) -> None:
    fewest = fewest_bins(lengths, max_tokens)
    assert fewest <= len(bins(lengths, max_tokens)) <= fewest + 1


@pytest.mark.parametrize(
    ("median", "sigma", "max_tokens", "least"),
    [
        (1280, 1.27, 16_384, 0.97),
        (1280, 1.27, 32_768, 0.95),
        (4000, 1.0, 16_384, 0.97),
        (4000, 1.0, 32_768, 0.97),
        (4000, 1.0, 65_536, 0.95),
        (6000, 0.6, 32_768, 0.97),
    ],
)
def test_bins_use_the_budget_on_long_tailed_rows(median: float, sigma: float, max_tokens: int, least: float) -> None:
    for seed in range(60):
        lengths = long_tailed(512, seed, median, sigma)
        assert use(lengths, max_tokens) >= least
        if sigma >= 1:  # enough short rows to fill every gap: as few bins as the tokens need
            assert len(bins(lengths, max_tokens)) <= math.ceil(sum(lengths) / max_tokens) + 1


def test_padding_uses_less_of_the_budget_than_packing() -> None:
    for seed in range(10):
        lengths = long_tailed(512, seed)
        assert len(bins(lengths, 32_768)) < len(microbatches(lengths, 32_768))


def test_ranks_that_wait_for_each_other_in_every_pass_are_busy() -> None:
    cost = DecoderCost.of(parameters=31_985_000_000, layers=64, attention_width=5120)
    for seed in range(30):
        lengths = long_tailed(512, seed)
        ranks = [[lengths[row] for row in rows] for rows in shards(lengths, 8, cost)]
        count = pass_count(ranks, 32_768, Layout.packed)
        passes = [[[rank[row] for row in rows] for rows in bins(rank, 32_768, count)] for rank in ranks]
        costs = [[sum(map(cost, rows)) for rows in rank] for rank in passes]
        slowest = sum(map(max, zip(*costs, strict=True)))
        assert slowest <= 1.03 * sum(map(sum, costs)) / 8  # asked for: 1.05


def test_passes_of_the_rank_that_needs_most() -> None:
    assert pass_count([[6, 5, 4, 3, 2], [9, 8, 7], []], 10, Layout.packed) == 3
    assert pass_count([[6, 5, 4, 3, 2], [9]], 10, Layout.packed) == 2
    assert pass_count([[6, 5, 4, 3, 2], [9]], 10, Layout.padded) == 3  # 6 | 5, 4 | 3, 2
    assert pass_count([[], []], 10, Layout.packed) == 0
    assert pass_count([], 10, Layout.packed) == 0


def test_packed_where_it_saves_more_than_a_tenth() -> None:
    assert choose_layout([[10, 10, 10]], 30, 0.9) is Layout.padded  # nothing to save
    assert choose_layout([[10, 9, 8]], 30, 0.9) is Layout.padded  # 27 of 30
    assert choose_layout([[10, 9, 8]], 30, 1.0) is Layout.packed
    assert choose_layout([[10, 9, 7]], 30, 0.9) is Layout.packed  # 26 of 30
    assert choose_layout([[10, 9, 7]], 30, 0.0) is Layout.padded
    assert choose_layout([[10, 9, 7]], 10, 0.9) is Layout.padded  # each alone
    assert choose_layout([[]], 10, 0.9) is Layout.padded


def test_waiting_for_other_ranks_counts() -> None:
    """Packed 16 | 9 beside 12 | 8 + 4, so 16 + 12 tokens; padded 16 | 9 beside 12 | 8 + 8, so 16 + 16."""
    ranks = [[16, 9], [8, 4, 12]]
    assert choose_layout(ranks[:1], 16, 1.0) is Layout.padded
    assert choose_layout(ranks, 16, 0.88) is Layout.packed
    assert choose_layout(ranks, 16, 0.87) is Layout.padded


def test_8192_rows_in_no_time() -> None:
    lengths = long_tailed(8192, 0)
    start = time.process_time()
    for layout in Layout:
        cut(lengths, 32_768, layout, at_least=600)
    assert time.process_time() - start < 1


@layouts
@pytest.mark.parametrize(
    ("lengths", "max_tokens", "found"),
    [([3, 0], 10, "shortest row of 0 and max_tokens = 10"), ([3], 0, "shortest row of 3 and max_tokens = 0")],
)
def test_wrong_input(layout: Layout, lengths: list[int], max_tokens: int, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        cut(lengths, max_tokens, layout)
