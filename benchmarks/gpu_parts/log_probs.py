"""Tiled log-probs beside the plain way: ``benchmarks/logprobs.py`` on this device."""

from dataclasses import asdict
from typing import Final

import logprobs
import torch

from gpu_parts.sections import Line, Report, Task

REPEATS: Final = 5
FULL: Final = ("log-prob", "both")
QUICK: Final = ("both",)
"""What has an upstream gradient."""


def cases(task: Task) -> list[logprobs.Case]:
    """At full size in the dtype of training: bfloat16 on a GPU."""
    sizes, dtype = logprobs.QUICK if task.quick else logprobs.FULL, "bfloat16" if task.device == "cuda" else "float32"
    upstreams = QUICK if task.quick else FULL
    return [logprobs.Case(*sizes, dtype, task.device, upstream) for upstream in upstreams]


def measure(task: Task, report: Report) -> None:
    """Time and peak memory of both ways; ratios are to the plain one."""
    for case in cases(task):
        inputs = logprobs.make_inputs(case)
        for contestant in ("plain", "ours"):  # kernels are compiled and chosen by the first call
            logprobs.run(contestant, case, inputs)
        del inputs
        for row in logprobs.measure(case, REPEATS, torch.get_num_threads()):
            told = f"time × {row.time_ratio:.2f}, memory × {row.memory_ratio:.3f} ({row.peak_mib:,.0f} MiB)"
            if row.contestant != "plain":
                told += f", gradients differ by {row.gradient_difference:.1e}"
            report(Line(f"{logprobs.title(case)}, {row.contestant}", f"{1e3 * row.seconds:,.1f} ms", told, asdict(row)))
