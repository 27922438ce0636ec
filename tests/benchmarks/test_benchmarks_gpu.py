"""The GPU benchmark on a CPU: at its tiny size it measures what it says, and tells what did not run."""

import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from conftest import REPOSITORY
from engine_speed.workloads import LONG_TAILED, make_workload
from gpu_parts import engine, scan, training, unit_checks
from gpu_parts.devices import cluster_of, peak_of
from gpu_parts.sections import Task, reported, run_section, timed
from torch.utils.flop_counter import FlopCounterMode

from vapo_async.build import BaseModel, build_learner
from vapo_async.learner.packing import WORTH_PACKING, Layout, choose_layout
from vapo_async.planning.plan import make_plan

SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"
script = runpy.run_path(str(SCRIPT))
main = script["main"]
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_run_measures_every_section_but_the_tests(tmp_path: Path) -> None:
    written = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    out = json.loads(written.read_text())
    assert out["not_run"] is None and out["quick"] and out["peak"] is None
    assert out["environment"]["device"] == "cpu"
    found = {section["section"]: section for section in out["sections"]}
    assert {name: section["status"] for name, section in found.items()} == {
        "tests": "skipped",
        "scan": "done",
        "log-probs": "done",
        "training": "done",
        "engine": "done",
    }
    assert "CUDA" in found["tests"]["reason"] and found["tests"]["rows"] == []
    assert out["seconds"] >= sum(section["seconds"] for section in out["sections"]) > 0
    check_scan(found["scan"]["rows"])
    check_training(found["training"]["rows"])
    check_engine(found["engine"]["rows"])
    assert [(row["contestant"], row["case"]["upstream"]) for row in found["log-probs"]["rows"]] == [
        ("plain", "both"),
        ("tiled", "both"),
    ]
    assert found["log-probs"]["rows"][1]["memory_ratio"] < 1
    assert "[5/5] engine: done" in done.stdout and "eta 0:00" in done.stdout
    assert "tests skipped: they need a CUDA device" in done.stdout.splitlines()[-1]


def check_scan(rows: list[dict[str, Any]]) -> None:
    """Ratios and GB/s belong to the times; the results are right."""
    by_name = {row["contestant"]: row for row in rows}
    assert set(by_name) == {"scan", "scan, step by step", "copy", "advantages", "advantages, step by step"}
    for name, error in (("scan", 1e-12), ("advantages", 1e-5)):
        row, slow = by_name[name], by_name[f"{name}, step by step"]
        assert 0 <= row["error"] < error
        assert row["faster_than_steps"] == pytest.approx(slow["ms"] / row["ms"])
    in_float64 = 8 * (2 * 4 * 256 + 4)  # x, y, one coefficient for each row
    assert by_name["scan"]["gb_s"] == pytest.approx(in_float64 / by_name["scan"]["ms"] / 1e6)
    of_a_response = 4 * (1 + 1 + 1 + 2) + 3  # value, next value, reward, two results; done, terminated, mask
    assert by_name["advantages"]["gb_s"] == pytest.approx(4 * 256 * of_a_response / by_name["advantages"]["ms"] / 1e6)


def check_training(rows: list[dict[str, Any]]) -> None:
    """FLOPs by hand; no MFU on a CPU, whose peak nobody knows, but a plan."""
    assert [row["activation_checkpointing"] for row in rows] == [True, False]
    lengths = [8 + length for length in training.QUICK.drawn()]
    for row in rows:
        assert row["model_flops"] == pytest.approx(flops_by_hand(lengths))
        assert row["tokens"] == sum(lengths) and row["responses"] == 8
        assert row["step_s"] == median(row["steps_s"]) > 0 and len(row["steps_s"]) == 3
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"])
        assert row["mfu"] is row["peak_flops"] is row["peak_gib"] is None and "no MFU" in row["note"]
        assert row["planned_s"] > 0 and row["planned_with"] == "A laptop, two cores"
    assert rows[0]["planned_s"] > rows[1]["planned_s"], "the plan knows what is computed again"
    assert rows[0]["modelled_gib"] < rows[1]["modelled_gib"]


def check_engine(rows: list[dict[str, Any]]) -> None:
    """Everything that was asked for was written; updates take time."""
    speed, keep, recompute = rows
    work = make_workload(LONG_TAILED, 8, engine.QUICK)
    assert speed["engine"] == "transformers" and speed["requests"] == 16 and speed["tokens"] == sum(work.lengths)
    assert speed["tokens_per_s"] == pytest.approx(speed["tokens"] / speed["seconds"])
    assert [keep["kv_cache"], recompute["kv_cache"]] == ["keep", "recompute"]
    assert all(0 < row["standstill_ms"] <= row["call_ms"] for row in (keep, recompute))


def flops_by_hand(lengths: list[int]) -> float:
    """Of policy and critic: a pass before the update, one in it, and twice that backwards.

    A layer has 128·128 numbers for queries, as many for the output, 128·64 each for keys and values, 256 biases,
    3·128·256 in the MLP and 2·128 in norms: 147,968. Two of them and the last norm are the critic; the policy has
    512·128 more. Attention: 2 FLOPs for each number of 128 queries and each of l² / 2 pairs, for scores and outputs.
    """
    critic = 2 * 147_968 + 128
    policy = critic + 512 * 128
    pairs = sum(length**2 for length in lengths)
    return 4 * (2 * (policy + critic) * sum(lengths) + 2 * (2 * 2 * 128 * pairs))


def test_a_step_makes_the_matrix_products_that_are_counted(tmp_path: Path) -> None:
    """Counted by torch, which does not count attention. The model has norms and prompts' logits too, and no padding."""
    work = training.QUICK
    folder = training.model_folder(work.shape, tmp_path)
    assert training.model_folder(work.shape, tmp_path) == folder and [*tmp_path.iterdir()] == [folder]
    lengths = work.drawn()
    rows = [8 + length for length in lengths]
    assert choose_layout([rows], work.tokens_per_microbatch, WORTH_PACKING["cpu"]) is Layout.packed
    config = training.config_for(work, folder, "cpu", checkpointing=False)
    learner = build_learner(config, BaseModel(folder, folder))
    batch = training.trajectories(work, lengths, 0)
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        result = learner.update(batch, 0)
    assert result.policy_steps == result.critic_steps == 2
    assert result.tokens == sum(lengths)
    assert result.metrics["engine_mismatch_mean"] < 1, "made-up log-probs are about those of random weights"
    known = training.Drawn.of(lengths, work.prompt_tokens)
    attention = 4 * 2 * 2 * (2 * 128 * sum((8 + length) ** 2 for length in lengths))
    products = training.model_flops(work, known) - attention
    assert counter.get_total_flops() == pytest.approx(products, rel=0.03)
    assert attention > 0.06 * products, "more than what is tolerated"


def test_known_lengths_have_their_own_moments() -> None:
    known = training.Drawn.of([1, 2, 6], prompt_tokens=3)
    assert known.mean_sequence == pytest.approx((4 + 5 + 9) / 3)
    assert known.mean_square_sequence == pytest.approx((16 + 25 + 81) / 3)


def test_without_a_gpu_a_plain_call_says_that_nothing_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "gpu.json")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("NOT RUN: torch") and "no CUDA device" in line and "--quick" in line
    out = json.loads((tmp_path / "gpu.json").read_text())
    assert "no CUDA device" in out["not_run"] and out["sections"] == []


FAKE = """
import subprocess, sys, time
from pathlib import Path
name, lines = sys.argv[sys.argv.index("--section") + 1], Path(sys.argv[sys.argv.index("--lines") + 1])
assert "--quick" in sys.argv
lines.write_text('{"what": "it", "took": "1 ms", "told": "fine", "row": {"ms": 1}}\\n{"what": "cut')
if name == "scan":
    print("much before")
    raise RuntimeError("the scan is broken")
if name == "training":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(r"PID").write_text(str(child.pid))
    time.sleep(1000)
"""


def test_a_section_that_fails_or_hangs_is_told_and_the_others_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, pid = tmp_path / "fake.py", tmp_path / "pid"
    fake.write_text(FAKE.replace("PID", str(pid)))
    monkeypatch.setitem(main.__globals__, "__file__", str(fake))
    monkeypatch.setitem(main.__globals__, "QUICK_LIMIT_S", 8.0)
    written = tmp_path / "gpu.json"
    assert main(["--quick", "--json", str(written), "--only", "scan", "engine", "training"]) == 1
    found = {section["section"]: section for section in json.loads(written.read_text())["sections"]}
    assert list(found) == ["scan", "training", "engine"], "in the order of the benchmark"
    assert [section["status"] for section in found.values()] == ["FAILED", "FAILED", "done"]
    assert found["scan"]["reason"] == "RuntimeError: the scan is broken"
    assert found["training"]["reason"] == "stopped: it took longer than 8 s"
    assert found["engine"]["reason"] is None
    assert all(section["rows"] == [{"ms": 1}] for section in found.values()), "what was measured before stays"
    printed = capfd.readouterr().out
    assert "scan FAILED: RuntimeError: the scan is broken" in printed.splitlines()
    assert "Traceback" in printed and printed.count("1 ms") == 3
    ended(int(pid.read_text()))


def ended(pid: int) -> None:
    """A process that was killed is gone, or waits for whoever has inherited it."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} goes on")


def test_a_section_that_is_killed_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    outcome = run_section("scan", command, 60, tmp_path / "scan.jsonl")
    assert (outcome.status, outcome.reason, outcome.lines) == ("FAILED", "killed by SIGKILL", [])
    silent = run_section("scan", [sys.executable, "-c", "raise SystemExit(3)"], 60, tmp_path / "other.jsonl")
    assert (silent.status, silent.reason) == ("FAILED", "exit code 3")


def test_sections_together_take_less_than_ten_minutes() -> None:
    assert sum(script["LIMITS_S"].values()) < 600


def test_lines_that_were_cut_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert reported(path) == []
    report = script["reporter"]("scan", path)
    report(scan.Line("a", "1 ms", "", {"ms": 1}))
    with path.open("a") as file:
        file.write('{"what": "b", "took"')
    assert [line.what for line in reported(path)] == ["a"]


def test_the_first_call_is_not_timed() -> None:
    calls: list[float] = []

    def call() -> int:
        calls.append(time.perf_counter())
        time.sleep(0.5 if len(calls) == 1 else 0.001)
        return len(calls)

    seconds, first = timed(call, "cpu", repeats=3, calls=2)
    assert (len(calls), first) == (7, 1)
    assert 0.001 <= seconds < 0.4


def test_step_by_step_by_hand() -> None:
    x, c = torch.tensor([[1.0, 2.0, 4.0], [1.0, 0.0, 8.0]]), torch.tensor([[0.5], [0.25]])
    assert scan.step_by_step(x, c).tolist() == [[3.0, 4.0, 4.0], [1.5, 2.0, 8.0]]


GPU_TESTS = """
import pytest

@pytest.fixture
def broken():
    raise OSError

@pytest.mark.gpu
def test_right(): pass

@pytest.mark.gpu
def test_wrong(): assert False

@pytest.mark.gpu
def test_on_a_broken_fixture(broken): pass

@pytest.mark.gpu
def test_left_out(): pytest.skip("two GPUs are needed")

def test_not_marked(): assert False
"""


def test_unit_checks_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(GPU_TESTS)
    monkeypatch.setattr(unit_checks, "REPOSITORY", tmp_path)
    lines: list[Any] = []
    with pytest.raises(RuntimeError, match=r"failed: test_some::test_wrong, test_some::test_on_a_broken_fixture$"):
        unit_checks.measure(Task(False, "cuda", tmp_path), lines.append)
    (line,) = lines
    assert line.told == "1 passed, 2 failed, 1 skipped (two GPUs are needed)"
    assert line.row["passed"] == 1 and line.row["skipped"] == {"test_some::test_left_out": "two GPUs are needed"}


def test_no_unit_checks_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text("def test_not_marked(): pass")
    monkeypatch.setattr(unit_checks, "REPOSITORY", tmp_path)
    with pytest.raises(RuntimeError, match="no test marked gpu passed"):
        unit_checks.measure(Task(False, "cuda", tmp_path), lambda line: None)
    with pytest.raises(RuntimeError, match="no results"):
        unit_checks.run_checks(["--no-such-option"], tmp_path, tmp_path / "nothing.xml")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        (H100, 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("cpu", None),
    ],
)
def test_peaks_are_of_whole_names(name: str, tflops: float | None) -> None:
    peak = peak_of(name)
    assert (peak and peak.flops / 1e12) == tflops
    assert (cluster_of(name, 80) is None) == (tflops is None)


def a_row(work: training.Work, known: training.Drawn, steps_s: tuple[float, ...]) -> training.Row:
    tokens = sum(known.tokens) + work.responses * work.prompt_tokens
    return training.Row("m", "bfloat16", True, work.responses, tokens, training.model_flops(work, known), steps_s)


def test_mfu_and_plan_of_a_known_gpu(tmp_path: Path) -> None:
    """And the efficiency that is told makes the plan say what was measured."""
    work = training.QUICK
    known = training.Drawn.of(work.drawn(), work.prompt_tokens)
    config = training.config_for(work, training.model_folder(work.shape, tmp_path), "cuda", checkpointing=True)
    cluster = cluster_of(H100, 79.0)
    assert cluster is not None and cluster.gpus == 1
    row = replace(a_row(work, known, ()), steps_s=(5e-5, 2e-5, 3e-5))
    judged = training.judged(row, config, known, H100, cluster)
    assert judged.step_s == 3e-5 and judged.note is None
    assert judged.mfu == pytest.approx(row.model_flops / 3e-5 / 989e12)
    assert judged.planned_s == pytest.approx(make_plan(config, cluster, known).learning.seconds)
    assert judged.learning_flops is not None
    as_told = replace(cluster, efficiency=replace(cluster.efficiency, learning_flops=judged.learning_flops))
    assert make_plan(config, as_told, known).learning.seconds == pytest.approx(3e-5)
    assert f"MFU {judged.mfu:.1%}" in training.told(judged) and H100 in training.told(judged)


def test_an_unknown_gpu_has_no_mfu_and_says_so(tmp_path: Path) -> None:
    work, name = training.QUICK, "NVIDIA H100 PCIe"
    known = training.Drawn.of(work.drawn(), work.prompt_tokens)
    config = training.config_for(work, training.model_folder(work.shape, tmp_path), "cuda", checkpointing=True)
    row = replace(a_row(work, known, ()), steps_s=(2.0,))
    judged = training.judged(row, config, known, name, cluster_of(name, 79.0))
    assert judged.mfu is judged.planned_s is judged.planned_with is None
    assert judged.step_s == 2.0 and judged.note is not None and name in judged.note
    assert judged.note in training.told(judged)


def test_a_model_that_does_not_fit_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GB hold the 0.5B model with activation checkpointing only; H100s hold both."""
    monkeypatch.setattr(training, "device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0.1 * 2**30, 48 * 2**30))
    config = training.config_for(training.FULL, tmp_path, "cuda", checkpointing=True)
    row = training.measure_one(training.FULL, config, "cuda")
    assert row.step_s is None and row.note is not None and row.note.endswith("GiB, 0.1 are free")
    assert training.told(row) == row.note
    wanted = {
        checkpointing: training.ROOM * training.modelled_bytes(training.FULL, config)
        for checkpointing in (True, False)
        for config in [training.config_for(training.FULL, tmp_path, "cuda", checkpointing)]
    }
    assert wanted[True] < 23 * 2**30 < wanted[False] < 75 * 2**30


@pytest.mark.parametrize(
    ("version", "told"), [(None, "not installed"), ("0.32.0+cpu", "for the CPU"), ("0.32.0", None)]
)
def test_a_gpu_wants_vllms_build_for_gpus(
    version: str | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise script["importlib"].metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(script["importlib"].metadata, "version", installed)
    reason = script["why_skipped"]("engine", "cuda")
    assert reason is None if told is None else told in reason and "pip install" in reason
    assert script["why_skipped"]("engine", "cpu") is None
    assert script["why_skipped"]("tests", "cuda") is None
