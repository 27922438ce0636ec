"""How long it will take: estimated before the start, corrected by what has been done."""

import time
from typing import Final

from engine_speed.runners import BASELINE
from engine_speed.workloads import Workload
from vapo_async.metrics.console import format_duration

STEP_S: Final = {"tiny": (3e-3, 6e-5), "smollm2": (0.06, 5e-3)}
"""A decode step of any engine takes about the first, and the second for each response in it: two free cores."""


class Progress:
    """Prints a line for everything that is done, with the time that is left."""

    def __init__(self, estimate_s: float) -> None:
        self._estimate_s, self._done_s = estimate_s, 0.0
        self._start = time.perf_counter()
        print(f"about {format_duration(estimate_s)} where two cores are free", flush=True)

    def done(self, text: str, estimate_s: float) -> None:
        """``estimate_s``: what this was thought to take."""
        self._done_s += estimate_s
        left_s = (time.perf_counter() - self._start) / self._done_s * (self._estimate_s - self._done_s)
        print(f"[{self._done_s / self._estimate_s:4.0%}] {text} · eta {format_duration(left_s)}", flush=True)


def run_estimate_s(model: str, engine: str, concurrency: int, work: Workload) -> float:
    """Of one run of a workload."""
    fixed, each = STEP_S[model]
    lengths = work.lengths
    if engine == BASELINE:
        batches = [lengths[first : first + concurrency] for first in range(0, len(lengths), concurrency)]
        return sum(max(batch) * (fixed + each * len(batch)) for batch in batches)
    return max(max(lengths), work.tokens / concurrency) * fixed + work.tokens * each
