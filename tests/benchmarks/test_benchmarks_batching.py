"""The benchmark of passes and ranks counts what it says, by hand."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from vapo_async.learner.packing import Layout

script = runpy.run_path(str(REPOSITORY / "benchmarks" / "batching.py"))
COST = script["COSTS"]["32B"]


def test_naive_ways_by_hand() -> None:
    assert script["in_order"](5, 2) == [[0, 1], [2, 3], [4]]
    assert script["in_turn"](5, 2) == [[0, 2, 4], [1, 3]]
    assert script["above_mean"]([3.0, 5.0, 4.0]) == pytest.approx(0.25)


def test_naive_passes_surely_fit() -> None:
    for budget, count in ((16_384, 8), (32_768, 4), (65_536, 2)):
        passes = script["passes_of"]([16_384] * 16, 2, budget, "in order")
        assert [len(rank) for rank in passes] == [count, count]
        assert max(sum(rows) for rank in passes for rows in rank) == budget


@pytest.mark.parametrize("way", ["packed", "padded", "in order"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_row_is_in_one_pass(way: str, ranks: int) -> None:
    lengths = script["long_tailed"](48, 3)
    passes = script["passes_of"](lengths, ranks, 32_768, way)
    assert len(passes) == ranks and len({len(rank) for rank in passes}) == 1
    assert sorted(length for rank in passes for rows in rank for length in rows) == sorted(lengths)


def test_cost_of_passes_by_hand() -> None:
    passes = [[[8, 4], [6]], [[7], [5, 5]]]  # of two ranks
    alone = sum(COST(length) for length in (8, 4, 6, 7, 5, 5))
    packed = (COST(8) + COST(4)) + 2 * COST(5)
    assert script["slower"](passes, Layout.packed) == pytest.approx(packed * 2 / alone - 1)
    padded = 2 * COST(8) + 2 * COST(5)
    assert script["slower"](passes, Layout.padded) == script["slower"](passes, "in order")
    assert script["slower"](passes, Layout.padded) == pytest.approx(padded * 2 / alone - 1)
    assert script["slower"]([[[3], [2]]], "in order") == pytest.approx(0)
    assert script["slower"]([[[3], []], [[3], []]], "in order") == pytest.approx(0)


def test_rows_of_the_tables_by_hand() -> None:
    """Two batches; budgets of 16,384: 10,000 tokens twice go into two passes, 8,192 twice into one."""
    batches = [[10_000, 10_000], [8_192, 8_192]]
    row = script["passes_row"](batches, 1, 16_384, Layout.packed)
    assert (row.passes, row.used.worst, row.used.median) == (1.5, 20_000 / 32_768, (20_000 / 32_768 + 1) / 2)
    assert row.possible == row.used.worst and row.slower.worst == pytest.approx(0)
    row = script["passes_row"](batches, 1, 16_384, "in order")
    assert (row.passes, row.used.worst, row.possible, row.chosen) == (2, 0.5, 1.0, {"cpu": 0.0, "cuda": 0.0})
    dealt = script["ranks_row"]([[2, 1, 2, 1]], 2, "attention")
    assert dealt.dealt.worst == 0 and dealt.in_turn.worst == pytest.approx(0.6)  # 4 + 4 of 10 against 5


def test_bounds() -> None:
    spread, row, ranks = script["Spread"], script["PassesRow"], script["RanksRow"]

    def passes(of_ranks: int, count: float, used: float, slow: float, way: str = "packed") -> Any:
        chosen = {"cpu": 0.0, "cuda": 1.0 if used != 0.95 else 0.9}
        return row(of_ranks, 16_384, way, count, spread(used + 0.02, used), 1.0, chosen, spread(0.0, slow))

    alone = [
        passes(1, 20, 0.94, 9.0),
        passes(1, 19.5, 0.94, 9.0),
        passes(1, 20, 0.95, 9.0),
        passes(1, 9, 0.1, 9.0, "padded"),
    ]
    dealt = [ranks(8, "32B", spread(0.0, 0.06), spread(0, 0)), ranks(8, "32B", spread(0.01, 0.05), spread(9, 9))]
    dealt.append(ranks(4, "32B", spread(9, 9), spread(9, 9)))
    together = [passes(8, 2, 0.1, 0.05), passes(8, 2, 0.1, 0.051), passes(8, 2, 0.1, 9.0, "in order")]
    found = script["bounds"](alone, dealt, together)
    assert [holds for _, holds in found] == [False, True, True, True, True, False, True, True, False, True, True, False]
    assert found[0][0] == "packed, 16,384 tokens: 94.0% used, the worst of the seeds (demanded >= 95%)"
    assert "96.0% used, the median" in found[1][0]
    assert found[5][0] == "ranks: 1, 16,384 tokens: packed on a GPU by 90% of seeds (demanded 100%)"


def test_holds_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script["main"](["--quick", "--json", str(tmp_path / "batching.json")]) == 0
    written = json.loads((tmp_path / "batching.json").read_text())
    ways = [(budget, way) for budget in (16_384, 32_768, 65_536) for way in ("packed", "padded", "in order")]
    for table in ("passes", "passes_of_ranks"):
        assert [(row["budget"], row["way"]) for row in written[table]] == ways
        naive = [row["used"]["median"] for row in written[table] if row["way"] == "in order"]
        packed = [row["used"]["median"] for row in written[table] if row["way"] == "packed"]
        assert max(naive) < 0.2 < 0.5 < min(packed)
    assert [row["ranks"] for row in written["ranks"]] == [2, 4, 8, 2, 4, 8]
    assert all(row["dealt"]["worst"] < 0.01 < row["in_turn"]["worst"] for row in written["ranks"])
    assert len(written["bounds"]) == 14 and all(bound["holds"] for bound in written["bounds"])
    printed = capsys.readouterr().out
    assert printed.count("holds") == 14 and "FAILS" not in printed


def test_a_missed_bound_is_told_and_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(script["main"].__globals__, "LEAST_USED", 1.01)
    assert script["main"](["--quick"]) == 1
    assert "FAILS  packed, 16,384 tokens: 9" in capsys.readouterr().out
