"""The benchmark of advantages measures what it says, on a small case and in this process."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

script = runpy.run_path(str(REPOSITORY / "benchmarks" / "gae.py"))


@pytest.mark.parametrize("contestant", ["ours", "loop", "vectorised"])
def test_contestants_agree(contestant: str) -> None:
    batch = script["make_batch"](3, 100)
    results = script["make_call"](contestant, batch)()
    assert [result.shape for result in results] == [(3, 100, 1)] * 2
    assert script["error_of"](contestant, results, batch) < 1e-5
    wrong = tuple(result + 1 for result in results)
    assert script["error_of"](contestant, wrong, batch) > 0.1


def test_the_copy_touches_every_tensor() -> None:
    batch = script["make_batch"](3, 100)
    copied = script["make_call"]("copy", batch)()
    entries = sum(x.numel() * x.element_size() for x in batch.values(include_nested=True, leaves_only=True))
    assert sum(x.numel() * x.element_size() for x in copied) == entries + 2 * 3 * 100 * 4


def test_memory_and_time_are_those_of_the_call() -> None:
    """In a process of its own, as what other tests freed could be used again."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gae.py"), "--measure", "copy", "64", "8192"]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured["ms"] > 0 and measured["error"] is None
    assert measured["extra_memory"] is None or measured["extra_memory"] == pytest.approx(23 / 15, rel=0.15)


def test_bounds() -> None:
    case = script["Case"](16, 4096, (), least_over_loop=10.0)
    row = script["Row"](16, 4096, "ours", 1.0, None, 12.0, 3.0, 5.0, None)
    assert [(text.split(": ")[1].split(" (")[0], holds) for text, holds in script["bounds"](case, row)] == [
        ("12 times faster than the loop", True),
        ("5 times the inputs of extra memory", False),
        ("not measured relative error", False),
    ]


def test_measures_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script["main"].__globals__["QUICK"] = (script["Case"](2, 64, ("ours", "copy")),)
    assert script["main"](["--quick", "--json", str(tmp_path / "gae.json")]) == 0
    written = json.loads((tmp_path / "gae.json").read_text())
    assert [row["contestant"] for row in written["gae"]] == ["ours", "copy"]
    assert written["gae"][0]["ms"] > 0 and written["gae"][0]["error"] < 1e-5
    assert "B 2 × T 64  ours" in capsys.readouterr().out
