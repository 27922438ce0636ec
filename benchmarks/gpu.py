"""What the software does on one GPU: its tests, the scan, log-probs, a training step's MFU, an engine's throughput.

    python benchmarks/gpu.py --json gpu.json            at most ten minutes on one GPU, without a network
    python benchmarks/gpu.py --quick                    does it run? a minute, on a CPU too
    python benchmarks/gpu.py --only training engine     some of the sections

Without a CUDA device a plain call measures nothing, says so, and ends with exit code 0, so that ``make bench`` goes on.
``--quick`` runs the same code at a tiny size, on the CPU where there is no GPU: all sections but the tests, which need
one, and with ``engine=transformers`` in the place of vLLM.

*tests* is ``pytest -m gpu tests``. *scan*, *log-probs*, *training* and *engine* are explained by the files of
``benchmarks/gpu_parts``; training and engine run a model of random weights in the shape of Qwen2.5-0.5B, in bfloat16.

Each section has a process and a time limit of its own; the limits together are less than ten minutes. One that fails
or takes longer is told in table and JSON, with what it had measured by then, and the others still run: exit code 1.
"""

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from bench import announce, command_line, environment, parse
from gpu_parts.devices import device_name, no_peak, peak_of
from gpu_parts.sections import FAILED, SKIPPED, Outcome, Task, reporter, run_section

from vapo_async.metrics.console import format_duration

LIMITS_S: Final = {"tests": 120.0, "scan": 60.0, "log-probs": 60.0, "training": 150.0, "engine": 190.0}
"""Of each section, in the order in which they run."""
QUICK_LIMIT_S: Final = 200.0
"""Of each with ``--quick``, most of whose time is that of imports: many times as long on a busy machine."""
PACKAGES: Final = ("transformers", "triton", "vllm", "liger-kernel")


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Options; ``--section`` and what follows it are for the processes of the sections."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(LIMITS_S), metavar="SECTION", help=f"of {', '.join(LIMITS_S)}"
    )
    parser.add_argument("--section", choices=tuple(LIMITS_S), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parse(parser, arguments)


def measure(name: str, task: Task, lines: Path) -> None:
    """One section, in its own process; each imports what it needs."""
    report = reporter(name, lines)
    match name:
        case "tests":
            from gpu_parts import unit_checks

            unit_checks.measure(task, report)
        case "scan":
            from gpu_parts import scan

            scan.measure(task, report)
        case "log-probs":
            from gpu_parts import log_probs

            log_probs.measure(task, report)
        case "training":
            from gpu_parts import training

            training.measure(task, report)
        case "engine":
            from gpu_parts import engine

            engine.measure(task, report)


def why_skipped(name: str, device: str) -> str | None:
    """None where the section can run."""
    if name == "tests" and device == "cpu":
        return "they need a CUDA device"
    if name == "engine" and device == "cuda":
        return without_vllm()
    return None


def without_vllm() -> str | None:
    """Why vLLM cannot be measured on a GPU; its builds for the CPU are a module of the same name."""
    try:
        found = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "vLLM's build for GPUs is not installed; pip install -e '.[vllm]'"
    return f"vLLM {found} is a build for the CPU; pip install -e '.[vllm]'" if "cpu" in found else None


def run_all(names: Sequence[str], task: Task) -> list[Outcome]:
    """One section after the other."""
    outcomes = []
    limits_s = {name: QUICK_LIMIT_S if task.quick else LIMITS_S[name] for name in names}
    for i, name in enumerate(names):
        head = f"[{i + 1}/{len(names)}] {name}"
        reason = why_skipped(name, task.device)
        if reason is not None:
            outcome = Outcome(name, SKIPPED, reason=reason)
        else:
            print(f"{head}: at most {format_duration(limits_s[name])}", flush=True)
            lines = task.scratch / f"{name}.jsonl"
            own = ["--section", name, "--scratch", str(task.scratch), "--lines", str(lines)]
            command = [sys.executable, __file__, *own, *(["--quick"] if task.quick else [])]
            outcome = run_section(name, command, limits_s[name], lines)
        outcomes.append(outcome)
        told = f"skipped: {reason}" if outcome.status == SKIPPED else f"{outcome.status} after {outcome.seconds:,.0f} s"
        left_s = sum(limits_s[later] for later in names[i + 1 :])
        print(f"{head}: {told} · eta {format_duration(left_s)} at most", flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for every number, one for every section that failed or was left out."""
    found = [(outcome.name, line.what, line.took, line.told) for outcome in outcomes for line in outcome.lines]
    widths = [max((len(row[i]) for row in found), default=0) for i in range(3)]
    texts = [
        f"{name:<{widths[0]}}  {what:<{widths[1]}}  {took:>{widths[2]}}  {told}".rstrip()
        for name, what, took, told in found
    ]
    ended = [f"{outcome.name} {outcome.status}: {outcome.reason}" for outcome in outcomes if outcome.reason is not None]
    return "\n".join([*texts, *ended])


def found_here(device: str) -> dict[str, Any]:
    """Versions, the device and its peak."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return environment(**versions, cuda=torch.version.cuda, device=device_name(device))


def main(arguments: list[str]) -> int:
    """Runs the sections, prints the table, writes the rows. 1 if a section failed."""
    options = options_of(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.section is not None:
        measure(options.section, Task(options.quick, device, options.scratch), options.lines)
        return 0
    before = found_here(device)
    written: dict[str, Any] = {"environment": before, "quick": options.quick, "not_run": None}
    if device == "cpu" and not options.quick:
        written |= {"not_run": f"torch {torch.__version__} sees no CUDA device", "sections": []}
        print(
            f"NOT RUN: {written['not_run']}, and nothing was measured; "
            "`python benchmarks/gpu.py --quick` runs the same code at a tiny size on the CPU"
        )
        write(options.json, written)
        return 0
    announce(before)
    name = device_name(device)
    peak = peak_of(name)
    print(no_peak(name) if peak is None else f"peak {peak.flops / 1e12:,.0f} TFLOP/s, {peak.memory_gb_s:,.0f} GB/s")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vapo-async-gpu-") as scratch:
        names = [section for section in LIMITS_S if options.only is None or section in options.only]
        outcomes = run_all(names, Task(options.quick, device, Path(scratch)))
    print(f"\n{table(outcomes)}")
    written |= {
        "seconds": time.perf_counter() - start,
        "peak": None if peak is None else asdict(peak),
        "load_average_after": environment()["load_average"],
        "sections": [outcome.to_json() for outcome in outcomes],
    }
    write(options.json, written)
    return 1 if any(outcome.status == FAILED for outcome in outcomes) else 0


def write(path: Path | None, written: dict[str, Any]) -> None:
    """Where it was asked for."""
    if path is not None:
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
