"""The log-prob benchmark at its minimal setting: both ways agree, and the tiled one holds less."""

import json
import runpy
from pathlib import Path

import pytest
from conftest import REPOSITORY

main = runpy.run_path(str(REPOSITORY / "benchmarks" / "logprobs.py"))["main"]


@pytest.mark.slow
def test_quick_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--repeats", "1", "--json", str(tmp_path / "logprobs.json")]) == 0
    rows = json.loads((tmp_path / "logprobs.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["plain", "tiled"] * 2
    for row in rows:
        assert row["seconds"] > 0
        assert row["gradient_difference"] < 1e-5
        assert (row["memory_ratio"] < 1) == (row["contestant"] == "tiled")
    assert "plain" in capsys.readouterr().out
