"""The chaos benchmark: real kills, and checks that can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks" / "chaos.py"


def chaos(tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    """In a process of its own, as it forks."""
    written = tmp_path / "chaos.json"
    command = [sys.executable, str(SCRIPT), "--json", str(written), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "FAILS" not in done.stdout and "holds  " in done.stdout
    reports = json.loads(written.read_text())["chaos"]
    assert isinstance(reports, list)
    return reports


@pytest.mark.slow
def test_three_kills_of_an_inline_run(tmp_path: Path) -> None:
    (report,) = chaos(tmp_path, "--kills", "3", "--only", "inline")
    assert report["kills"] == {"process": 1, "judge": 1, "checkpoint": 1}
    assert report["starts"] == 3, "the run itself survives the judge"
    assert len(report["checks"]) == 9  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_twenty_kills_of_each(tmp_path: Path) -> None:
    reports = chaos(tmp_path, "--kills", "20")
    assert [report["launcher"] for report in reports] == ["inline", "ray"]
    assert all(sum(report["kills"].values()) == 20 for report in reports)  # type: ignore[attr-defined]


def test_what_is_trained_on_twice_or_lost_is_seen(tmp_path: Path) -> None:
    """The checks themselves, on a ledger made by hand."""
    tickets = {"charged": 4, "committed": 4, "refunded": 0, "outstanding": 0}
    rows = [{"version": 1, "tickets": [0, 1], "ages": [0, 0]}, {"version": 2, "tickets": [2, 3], "ages": [0, 4]}]

    def holding(rows: list[dict[str, object]], tickets: dict[str, int]) -> list[bool]:
        (tmp_path / "flow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "summary.json").write_text(json.dumps({"tickets": tickets}))
        script = (
            "import json, sys; from pathlib import Path; from killing.checks import ledger_checks;"
            "print(json.dumps([holds for _, holds in ledger_checks(Path(sys.argv[1]), 2)]))"
        )
        environment = os.environ | {"PYTHONPATH": str(SCRIPT.parent)}
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
        )
        found = json.loads(done.stdout)
        assert isinstance(found, list)
        return found

    assert holding(rows, tickets) == [True, True, True, True]
    assert holding([rows[0], rows[1] | {"tickets": [1, 3]}], tickets | {"charged": 5}) == [True, False, False, True]
    assert holding([rows[0] | {"ages": [5, 0]}], tickets) == [False, True, True, False]


def test_wrong_json_folder_is_refused_before_anything_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "nowhere" / "chaos.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no folder" in done.stderr
