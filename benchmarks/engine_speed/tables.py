"""The rows as text, and what is demanded of them."""

from collections.abc import Sequence
from typing import Final

from engine_speed.runners import BASELINE, VLLM
from engine_speed.speeds import SpeedRow
from engine_speed.stalls import IMPOSSIBLE, STEPS_PER_UPDATE, StallRow
from engine_speed.workloads import LONG_TAILED

STANDSTILL_LIMIT_MS: Final = {"tiny": 150, "smollm2": 1500}
VLLM_SPEEDUP: Final = ("smollm2", 64, 2.0)
"""Model, long-tailed responses in flight, times the speed of ``generate``."""


def speed_table(rows: Sequence[SpeedRow]) -> str:
    """One line for each row."""
    head = ["model", "lengths", "in flight", "engine", "tokens/s", "× generate", "per CPU-second", "× generate"]
    lines = [
        [
            *(row.model, row.lengths, str(row.concurrency), row.engine),
            *(f"{row.tokens_per_s:,.0f}", _number(row.speedup, 2)),
            *(f"{row.tokens_per_cpu_s:,.0f}", _number(row.cpu_speedup, 2)),
        ]
        for row in rows
    ]
    return _aligned([head, *lines], words=(0, 1, 3))


def stall_table(rows: Sequence[StallRow]) -> str:
    """One line for each row."""
    head = ["model", "in flight", "engine", "KV cache", "tokens held", "step ms", "stands still ms", "load ms"]
    head += ["call ms", "lost ms", "lost CPU ms", "still %", "lost %"]
    lines = [
        [
            *(row.model, str(row.concurrency), row.engine, row.kv_cache, f"{row.tokens_in_flight:,}"),
            *(_number(ms, 1) for ms in (row.decode_step_ms, row.standstill_ms, row.load_ms, row.call_ms)),
            *(_number(ms, 1) for ms in (row.lost_ms, row.lost_cpu_ms)),
            *(_number(percent, 1) for percent in (row.standstill_percent, row.lost_percent)),
        ]
        for row in rows
    ]
    note = f"still and lost: of generation, at one update for every {STEPS_PER_UPDATE} decode steps"
    return f"a weight update ({note})\n{_aligned([head, *lines], words=(0, 2, 3))}"


def bounds(speeds: Sequence[SpeedRow], stalls: Sequence[StallRow]) -> list[tuple[str, bool]]:
    """What is demanded of vLLM in the rows that there are, and whether it holds."""
    found = []
    kinds = sorted(
        {(row.model, row.engine, row.kv_cache) for row in stalls if row.engine == VLLM and row.kv_cache != IMPOSSIBLE}
    )
    for model, engine, kv_cache in kinds:
        worst = max(
            (row for row in stalls if (row.model, row.engine, row.kv_cache) == (model, engine, kv_cache)),
            key=lambda row: row.standstill_ms or 0.0,
        )
        stands_ms, limit_ms = worst.standstill_ms or 0.0, STANDSTILL_LIMIT_MS[model]
        where = f"{engine} ({kv_cache}) at most, with {worst.concurrency} in flight"
        text = f"an update of {model} stalls {where}: {stands_ms:,.0f} ms (demanded < {limit_ms:,})"
        found.append((text, stands_ms < limit_ms))
    model, concurrency, least = VLLM_SPEEDUP
    for row in speeds:
        found_here = (row.model, row.concurrency, row.lengths, row.engine) == (model, concurrency, LONG_TAILED, VLLM)
        if found_here and row.speedup is not None:
            what = f"{VLLM} with {concurrency} long-tailed responses of {model} in flight"
            found.append((f"{what}: {row.speedup:.2f} × {BASELINE} (demanded >= {least:g})", row.speedup >= least))
    return found


def _number(value: float | None, digits: int) -> str:
    return IMPOSSIBLE if value is None else f"{value:,.{digits}f}"


def _aligned(lines: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    """Columns two spaces apart; ``words``: the columns that are text, and begin on the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = (
        [f"{cell:<{w}}" if i in words else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)
