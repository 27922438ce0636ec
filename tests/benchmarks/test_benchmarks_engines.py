"""The engine benchmark at its minimal setting: every engine writes what was asked for, rows add up."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from engine_speed.progress import run_estimate_s
from engine_speed.runners import run
from engine_speed.speeds import SpeedRow
from engine_speed.stalls import StallRow
from engine_speed.tables import bounds
from engine_speed.workloads import QUICK, TINY, Workload, make_workload, update_workload

from vapo_async.config import KVCacheOnUpdate

SCRIPT = REPOSITORY / "benchmarks" / "engines.py"
main = runpy.run_path(str(SCRIPT))["main"]
IN_THIS_PROCESS = ("embedded", "continuous batching", "generate")


def check(out: dict[str, Any], printed: str, names: tuple[str, ...]) -> None:
    """One row for each engine and kind of lengths, one for each engine and kind of update."""
    speeds = {(row["lengths"], row["engine"]): row for row in out["speed"]}
    assert sorted(speeds) == sorted((lengths, name) for lengths in ("uniform", "long-tailed") for name in names)
    assert len(out["speed"]) == len(speeds)
    for lengths in ("uniform", "long-tailed"):
        baseline, work = speeds[lengths, "generate"], make_workload(lengths, 4, QUICK)
        assert baseline["speedup"] == baseline["cpu_speedup"] == 1
        for name in names:
            row = speeds[lengths, name]
            assert row["requests"] == 8 and row["tokens"] == sum(work.lengths) > 0
            assert row["speedup"] == pytest.approx(row["tokens_per_s"] / baseline["tokens_per_s"])
            assert row["cpu_speedup"] == pytest.approx(row["tokens_per_cpu_s"] / baseline["tokens_per_cpu_s"])
    updates = {(row["engine"], row["kv_cache"]): row for row in out["weight_update"]}
    expected = {
        "embedded": ("keep", "recompute"),
        "vllm": ("keep", "recompute"),
        "continuous batching": ("keep",),
        "generate": ("n/a",),
    }
    assert sorted(updates) == sorted((name, kind) for name in names for kind in expected[name])
    for (name, _), row in updates.items():
        if name == "generate":
            assert row["standstill_ms"] is row["call_ms"] is row["lost_ms"] is row["lost_percent"] is None
            continue
        assert 0 < row["standstill_ms"] <= row["call_ms"]
        assert 0 < row["load_ms"] <= row["call_ms"]
        of_100_steps = 100 * row["standstill_ms"] / (100 * row["decode_step_ms"] + row["standstill_ms"])
        assert row["standstill_percent"] == pytest.approx(of_100_steps)
    assert out["environment"]["torch_threads"] == 1
    assert "about 0:" in printed and "[100%]" in printed and "n/a" in printed


def test_quick_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "engines.json"
    assert main(["--quick", "--json", str(written), "--engines", *IN_THIS_PROCESS]) == 0
    check(json.loads(written.read_text()), capsys.readouterr().out, IN_THIS_PROCESS)


@pytest.mark.slow
@pytest.mark.vllm
def test_quick_run_with_vllm_writes_every_row(tmp_path: Path) -> None:
    """In a process of its own: vLLM reads the environment when it is imported."""
    written = tmp_path / "engines.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    out = json.loads(written.read_text())
    check(out, done.stdout, (*IN_THIS_PROCESS, "vllm"))
    assert out["environment"]["vllm"]
    (keep,) = (row for row in out["weight_update"] if (row["engine"], row["kv_cache"]) == ("vllm", "keep"))
    assert keep["standstill_ms"] > 20, "vLLM itself waits for 20 ms within a pause"
    assert keep["load_ms"] < keep["call_ms"], "the file is written before"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--json", "{folder}/nowhere/engines.json"], "no folder"),
        (["--engines", "llama.cpp"], "invalid choice"),
        (["--concurrency", "8", "1"], "--concurrency is 1, expected at least 2"),
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([text.replace("{folder}", str(tmp_path)) for text in arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert told in printed.err and "in flight" not in printed.out


class Scripted:
    """Ends one response a step with so many tokens."""

    processes = ()

    def __init__(self, written: list[int]) -> None:
        self.written = list(enumerate(written))
        self.updated_after: int | None = None

    def start(self, work: Workload, on_update: KVCacheOnUpdate) -> None:
        self.steps = 0

    def advance(self) -> list[tuple[int, int]]:
        self.steps += 1
        return self.written[self.steps - 2 : self.steps - 1] if self.steps > 1 else []

    def update(self) -> None:
        assert self.updated_after is None, "one update"
        self.updated_after = self.steps

    def close(self) -> None:
        pass


def test_a_response_of_another_length_is_seen_and_the_update_comes_with_the_first_end() -> None:
    work = Workload([[3], [4], [5]], [2, 4, 4])
    runner = Scripted([2, 4, 4])
    run(runner, work, at_first_end=runner.update)
    assert runner.updated_after == 2 and runner.steps == 4
    with pytest.raises(RuntimeError, match="did not write the tokens"):
        run(Scripted([2, 3, 4]), work)


def test_workloads_are_the_same_again_and_updates_come_half_way() -> None:
    assert make_workload("long-tailed", 8, TINY) == make_workload("long-tailed", 8, TINY)
    lengths = make_workload("long-tailed", 256, TINY).lengths
    assert len(lengths) == 512 and min(lengths) >= 1 and max(lengths) == TINY.longest_tokens
    assert 20 <= sorted(lengths)[256] <= 28, "the median is 24"
    assert update_workload(8, TINY).lengths == [50] + [100] * 7
    assert all(len(p) + n <= TINY.max_length for p, n in zip(*vars(update_workload(8, TINY)).values(), strict=True))


def test_the_estimate_counts_the_steps_that_generate_wastes() -> None:
    work = Workload([[3]] * 4, [1, 10, 1, 1])
    fixed, each = 3e-3, 6e-5
    assert run_estimate_s("tiny", "generate", 2, work) == pytest.approx(10 * (fixed + 2 * each) + (fixed + 2 * each))
    assert run_estimate_s("tiny", "vllm", 2, work) == pytest.approx(10 * fixed + 13 * each)


def test_bounds_hold_and_fail() -> None:
    def speed(engine: str, speedup: float, concurrency: int = 64) -> SpeedRow:
        return SpeedRow("smollm2", "long-tailed", concurrency, engine, 128, 5000, 100.0, 90.0, speedup, 1.0)

    def stall(model: str, standstill_ms: float | None, kv_cache: str = "keep") -> StallRow:
        return StallRow(model, 8, "vllm", kv_cache, 100, 10.0, standstill_ms)

    good = [speed("vllm", 2.5), speed("vllm", 1.1, concurrency=8), speed("embedded", 1.5)]
    assert [holds for _, holds in bounds(good, [])] == [True]
    assert [holds for _, holds in bounds([speed("vllm", 1.9)], [])] == [False]
    rows = [stall("tiny", 149), stall("smollm2", 1499), stall("smollm2", 1501, "recompute"), stall("tiny", None, "n/a")]
    assert sorted(holds for _, holds in bounds([], rows)) == [False, True, True]
    assert [holds for _, holds in bounds([], [stall("tiny", 149), stall("tiny", 151)])] == [False], "the worst counts"
