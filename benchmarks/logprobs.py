"""Time and memory of tiled log-probs and entropies beside the plain way, forward and backward.

    python benchmarks/logprobs.py --json logprobs.json     a few minutes on two cores, 12 GiB of memory
    python benchmarks/logprobs.py --quick                   seconds: does it run?

The plain way is linear → / temperature → log_softmax → gather, the entropy from the log-probs, and autograd. Every
token has its own upstream gradient. With *log-prob* the entropy is read and not differentiated, as in a loss without
an entropy bonus; with *both* it is. Contestants take turns within each repeat; times are medians. Memory is the peak
above the level after the inputs were made, each contestant in a process of its own; it counts the gradients of hidden
and weight, which both must hand out (*less gradients*: without them). Gradients are compared by the largest difference
over the largest entry. CPU-seconds are the process's own, which a busy machine disturbs less. On a GPU the inputs are
bfloat16 too, where Liger does the work if it can; time is wall time after synchronisation.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench import announce, command_line, environment, parse
from torch import Tensor

from vapo_async.objectives.logprobs import token_log_probs
from vapo_async.objectives.logprobs_liger import liger_takes

TEMPERATURE = 0.9
MEMORY_BOUND, TIME_BOUND, GRADIENT_BOUND = 1 / 8, 1.5, 1e-5
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """What is computed."""

    tokens: int
    vocabulary: int
    hidden: int
    dtype: str
    device: str
    upstream: str
    """``log-prob`` or ``both``."""


@dataclass(frozen=True)
class Row:
    """One contestant on one case; ratios are to the plain way."""

    case: Case
    contestant: str
    seconds: float
    cpu_seconds: float
    peak_mib: float
    peak_less_gradients_mib: float
    time_ratio: float
    cpu_ratio: float
    memory_ratio: float
    gradient_difference: float
    output_difference: float


FULL = (4096, 151_936, 896)
SMALL = (1024, 49_152, 576)
QUICK = (256, 5_000, 32)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Contestant = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, differentiate_entropy: bool) -> tuple[Tensor, Tensor]:
    """All logits at once."""
    logits = torch.nn.functional.linear(hidden, weight) / TEMPERATURE
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    del logits
    with torch.set_grad_enabled(differentiate_entropy):
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def make_inputs(case: Case) -> Inputs:
    """hidden, weight, targets, and the upstream gradients of log-prob and entropy."""
    torch.manual_seed(0)
    like = {"dtype": getattr(torch, case.dtype), "device": case.device}
    hidden = torch.randn(case.tokens, case.hidden, **like).requires_grad_()
    weight = torch.empty(case.vocabulary, case.hidden, **like).normal_(std=case.hidden**-0.5 * 2).requires_grad_()
    targets = torch.randint(0, case.vocabulary, (case.tokens,), device=case.device)
    upstream = torch.randn(2, case.tokens, device=case.device)
    return hidden, weight, targets, upstream[0], upstream[1]


def run(contestant: str, case: Case, inputs: Inputs) -> list[Tensor]:
    """Forward and backward: log-probs, entropies and both gradients."""
    hidden, weight, targets, g_log_prob, g_entropy = inputs
    both = case.upstream == "both"
    if contestant == "plain":
        log_prob, entropy = plain(hidden, weight, targets, both)
    else:
        log_prob, entropy = token_log_probs(hidden, weight, targets, TEMPERATURE)
    loss = (g_log_prob * log_prob).sum()
    if both:
        loss = loss + (g_entropy * entropy).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    return [log_prob.detach(), entropy.detach(), *grads]


def measure_peak(contestant: str, case: Case) -> float:
    """Peak bytes above the level after the inputs were made. For a process that does nothing else."""
    small = Case(8, 64, case.hidden, case.dtype, case.device, case.upstream)
    run(contestant, small, make_inputs(small))  # thread pools and libraries are not the contestant's
    inputs = make_inputs(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        results = run(contestant, case, inputs)
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        level = resident("VmRSS")
        results = run(contestant, case, inputs)
        peak = resident("VmHWM")
    del results
    return float(peak - level)


def resident(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return 1024 * int(found[1])


def peak_in_new_process(contestant: str, case: Case, threads: int) -> float:
    """:func:`measure_peak` in a process of its own."""
    task = json.dumps({"contestant": contestant, "case": asdict(case), "threads": threads})
    command = [sys.executable, __file__, "--peak-of", task]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(case: Case, repeats: int, threads: int) -> list[Row]:
    """Rows of the plain way and of ours, which on a GPU may be Liger's."""
    inputs = make_inputs(case)
    ours = "tiled"
    if liger_takes(inputs[0], inputs[1], None):
        ours = "liger"
    names = ("plain", ours)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, list[Tensor]] = {}
    for repeat in range(repeats):
        for name in names:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            results = run(name, case, inputs)
            if case.device == "cuda":
                torch.cuda.synchronize()
            wall[name].append(time.perf_counter() - wall_s)
            cpu[name].append(time.process_time() - cpu_s)
            first.setdefault(name, results)
            del results
            log(f"{title(case)}, {name}, repeat {repeat + 1}/{repeats}: {wall[name][-1]:.2f} s")
    differences = [
        float((a.float() - b.float()).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(first[ours], first["plain"], strict=True)
    ]
    gradients = sum(grad.numel() * grad.element_size() for grad in first["plain"][2:])
    del first, inputs
    if case.device == "cuda":
        torch.cuda.empty_cache()  # the peaks are those of other processes
    peaks = {name: peak_in_new_process(name, case, threads) for name in names}
    rows = []
    for name in names:
        seconds, cpu_seconds = statistics.median(wall[name]), statistics.median(cpu[name])
        rows.append(
            Row(
                case=case,
                contestant=name,
                seconds=seconds,
                cpu_seconds=cpu_seconds,
                peak_mib=peaks[name] / MIB,
                peak_less_gradients_mib=(peaks[name] - gradients) / MIB,
                time_ratio=seconds / statistics.median(wall["plain"]),
                cpu_ratio=cpu_seconds / statistics.median(cpu["plain"]),
                memory_ratio=peaks[name] / peaks["plain"],
                gradient_difference=0.0 if name == "plain" else max(differences[2:]),
                output_difference=0.0 if name == "plain" else max(differences[:2]),
            )
        )
    return rows


def title(case: Case) -> str:
    """``T 4096, V 151936, H 896, float32, both``."""
    return f"T {case.tokens}, V {case.vocabulary}, H {case.hidden}, {case.dtype}, {case.upstream}"


def print_table(rows: list[Row]) -> None:
    """The rows, and whether the bounds hold, which are for float32 at full size."""
    columns = ("time s", "CPU s", "peak MiB", "less gradients", "time ×", "CPU ×", "memory ×", "gradients differ")
    print(f"{'':<46}{'':<8}" + "".join(f"{column:>{len(column) + 3}}" for column in columns))
    for row in rows:
        values = (
            f"{row.seconds:.3f}",
            f"{row.cpu_seconds:.3f}",
            f"{row.peak_mib:,.0f}",
            f"{row.peak_less_gradients_mib:,.0f}",
            f"{row.time_ratio:.2f}",
            f"{row.cpu_ratio:.2f}",
            f"{row.memory_ratio:.3f}",
            f"{row.gradient_difference:.1e}",
        )
        cells = "".join(f"{value:>{len(column) + 3}}" for value, column in zip(values, columns, strict=True))
        print(f"{title(row.case):<46}{row.contestant:<8}{cells}")
    print()
    for row in rows:
        case = row.case
        if row.contestant == "plain" or (case.tokens, case.vocabulary, case.hidden) != FULL or case.dtype != "float32":
            continue
        bounds = (
            ("memory", row.memory_ratio, MEMORY_BOUND),
            ("time", row.time_ratio, TIME_BOUND),
            ("gradients", row.gradient_difference, GRADIENT_BOUND),
        )
        said = ", ".join(
            f"{name} {value:.3g} {'≤' if value <= bound else 'ABOVE'} {bound:g}" for name, value, bound in bounds
        )
        print(f"{title(case)}: {said}")


def log(line: str) -> None:
    """Progress goes to standard error."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Runs it, prints the table, writes rows."""
    parser = command_line(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of every contestant (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parse(parser, arguments)
    if options.peak_of is not None:
        task = json.loads(options.peak_of)
        torch.set_num_threads(task["threads"])
        print(measure_peak(task["contestant"], Case(**task["case"])))
        return 0
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    before = environment(device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    announce(before)
    kinds = [("float32", "cuda"), ("bfloat16", "cuda")] if torch.cuda.is_available() else [("float32", "cpu")]
    rows: list[Row] = []
    for size in (QUICK,) if options.quick else (SMALL, FULL):
        for dtype, device in kinds:
            for upstream in ("log-prob", "both"):
                rows += measure(Case(*size, dtype, device, upstream), options.repeats, options.threads)
    print_table(rows)
    if options.json is not None:
        result = {"environment": before, "load_average_after": environment()["load_average"]}
        rows_out = {"rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result | rows_out, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
