"""The engine benchmark at its minimal setting: every engine writes what was asked for, rows add up."""

import json
import runpy
from pathlib import Path

import pytest
from conftest import REPOSITORY

main = runpy.run_path(str(REPOSITORY / "benchmarks" / "engines.py"))["main"]


def test_quick_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json", str(tmp_path / "engines.json")]) == 0
    out = json.loads((tmp_path / "engines.json").read_text())
    speeds = {(row["lengths"], row["engine"]): row for row in out["speed"]}
    assert {engine for _, engine in speeds} == {"embedded", "continuous batching", "generate"}
    assert len(speeds) == len(out["speed"]) == 6
    for lengths in ("uniform", "long-tailed"):
        baseline = speeds[lengths, "generate"]
        assert baseline["speedup"] == baseline["cpu_speedup"] == 1
        for engine in ("embedded", "continuous batching"):
            row = speeds[lengths, engine]
            assert row["tokens"] == baseline["tokens"] > 0
            assert row["speedup"] == pytest.approx(row["tokens_per_s"] / baseline["tokens_per_s"])
    assert speeds["uniform", "embedded"]["tokens"] == 8 * speeds["uniform", "embedded"]["requests"]
    assert [row["kv_cache"] for row in out["weight_update"]] == ["keep", "recompute"]
    assert all(row["stall_ms"] > 0 for row in out["weight_update"])
    assert out["environment"]["torch_threads"] == 1
    printed = capsys.readouterr().out
    assert "[6/6]" in printed and "weight update" in printed


def test_wrong_json_folder_is_refused_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--json", str(tmp_path / "nowhere" / "engines.json")])
    assert stop.value.code == 2
    assert "no folder" in capsys.readouterr().err
