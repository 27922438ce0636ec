"""The reverse linear scan behind advantages and value targets, beside loops over the steps and a copy.

*scan* is ``reverse_scan`` in float64 with a coefficient per row, *scan, step by step* the same recurrence as a loop in
Python. *advantages* and *advantages, step by step* are ``benchmarks/gae.py``'s: ``LengthAdaptiveGAE`` with every check,
and TorchRL's loop. GB/s: what has to be read and written once, by the time; a copy reads and writes as much as a scan.
"""

from dataclasses import asdict, dataclass
from typing import Final

import gae
import torch
from torch import Tensor

from gpu_parts.sections import Line, Report, Task, timed
from vapo_async.objectives.scan import reverse_scan

FULL: Final = ((64, 32_768), (512, 8192))
QUICK: Final = ((4, 256),)
REPEATS: Final = 9
FEW: Final = 3
"""Repeats of what takes a step at a time."""


@dataclass(frozen=True)
class Row:
    """One contestant on B rows of T steps."""

    rows: int
    steps: int
    contestant: str
    ms: float
    gb_s: float
    faster_than_steps: float | None
    """Than the same step by step; None for these themselves and for the copy."""
    error: float | None
    """Largest difference by the largest result, to the loop in float64."""


def measure(task: Task, report: Report) -> None:
    """All sizes."""
    with torch.no_grad():
        for rows, steps in QUICK if task.quick else FULL:
            for row in [*scans(rows, steps, task.device), *advantages(rows, steps, task.device)]:
                faster = None if row.faster_than_steps is None else f"{row.faster_than_steps:,.1f} × step by step"
                error = None if row.error is None else f"error {row.error:.1e}"
                told = ", ".join(filter(None, (f"{row.gb_s:,.3g} GB/s", faster, error)))
                report(Line(f"B {rows} × T {steps:,}, {row.contestant}", f"{row.ms:,.3f} ms", told, asdict(row)))


def scans(rows: int, steps: int, device: str) -> list[Row]:
    """The recurrence alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, steps, dtype=torch.float64, generator=generator).to(device)
    c = gae.row_lambda(gae.make_batch(rows, steps))[..., 0].to(device)
    moved = 2 * x.numel() * x.element_size() + c.numel() * c.element_size()
    slow, expected = timed(lambda: step_by_step(x, c), device, FEW)
    fast, found = timed(lambda: reverse_scan(x, c), device, REPEATS, calls=10)
    copied, _ = timed(x.clone, device, REPEATS, calls=10)
    error = float((found - expected).abs().max() / expected.abs().max())
    return [
        Row(rows, steps, "scan", 1e3 * fast, moved / fast / 1e9, slow / fast, error),
        Row(rows, steps, "scan, step by step", 1e3 * slow, moved / slow / 1e9, None, None),
        Row(rows, steps, "copy", 1e3 * copied, moved / copied / 1e9, None, None),
    ]


def step_by_step(x: Tensor, coefficient: Tensor) -> Tensor:
    """y_t = x_t + c · y_{t+1}; x [B, T], coefficient [B, 1]."""
    y = x.clone()
    for t in range(x.shape[1] - 2, -1, -1):
        y[:, t] += coefficient[:, 0] * y[:, t + 1]
    return y


def advantages(rows: int, steps: int, device: str) -> list[Row]:
    """Advantages and value targets of whole responses."""
    on_cpu = gae.make_batch(rows, steps)
    batch = on_cpu.to(device)
    moved = sum(x.numel() * x.element_size() for x in gae.make_call("copy", on_cpu)())
    slow, _ = timed(gae.make_call("loop", batch), device, FEW)
    fast, found = timed(gae.make_call("ours", batch), device, REPEATS)
    error = gae.error_of("ours", tuple(result.cpu() for result in found), on_cpu)
    return [
        Row(rows, steps, "advantages", 1e3 * fast, moved / fast / 1e9, slow / fast, error),
        Row(rows, steps, "advantages, step by step", 1e3 * slow, moved / slow / 1e9, None, None),
    ]
