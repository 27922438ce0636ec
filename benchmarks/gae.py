"""Time, memory and accuracy of length-adaptive GAE beside TorchRL's two forms of GAE with a λ per row, and a copy.

    python benchmarks/gae.py --json gae.json      a minute on two cores, most of it TorchRL's vectorised form
    python benchmarks/gae.py --quick              seconds: does it run?

*ours* is ``LengthAdaptiveGAE(gamma=1.0, alpha=0.05)(batch)`` with every check, on a TensorDict with TorchRL's keys; it
computes two recursions, advantages with a λ per row and value targets with λ = 1. *vectorised* and *loop* are TorchRL's
``vec_generalized_advantage_estimate`` and ``generalized_advantage_estimate``, one recursion with the same λ per row.
*copy* clones every tensor that has to be read or written. Responses are T/2 to T tokens long.

Each number comes from a process of its own. Time is the median of several calls after the first (one call of the
vectorised form), memory the peak above the inputs in the first call, error the largest against TorchRL's loop in
float64, by that one's largest result.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bench import announce, command_line, environment, parse, print_bounds
from tensordict import TensorDict
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate, vec_generalized_advantage_estimate

from vapo_async.objectives.advantage import length_adaptive_lambda
from vapo_async.objectives.estimators import LengthAdaptiveGAE

ALPHA = 0.05
REPEATS = {"ours": 15, "copy": 15, "loop": 3, "vectorised": 1}
MOST_MEMORY, MOST_ERROR = 4.0, 1e-5
"""Demanded of ours on every case: extra memory by the inputs, error."""


@dataclass(frozen=True)
class Case:
    """Rows and tokens, and what is run on them."""

    rows: int
    tokens: int
    contestants: tuple[str, ...]
    least_over_vectorised: float | None = None
    """How many times faster ours has to be."""
    least_over_loop: float | None = None
    most_copies: float | None = None

    def __str__(self) -> str:
        return f"B {self.rows} × T {self.tokens}"


FULL = (
    Case(16, 4096, ("ours", "copy", "loop", "vectorised"), least_over_vectorised=1000.0, least_over_loop=10.0),
    Case(64, 32768, ("ours", "copy", "loop"), most_copies=6.0),
)
QUICK = (Case(4, 256, ("ours", "copy", "loop", "vectorised")),)


@dataclass(frozen=True)
class Measured:
    """One contestant on one case, in a process of its own."""

    ms: float
    extra_memory: float | None
    """Peak bytes above the inputs, by the bytes of the inputs; None where the system does not tell."""
    error: float | None


@dataclass(frozen=True)
class Row:
    """A line of the table; ratios are None where the other contestant was not run."""

    rows: int
    tokens: int
    contestant: str
    ms: float
    faster_than_vectorised: float | None
    faster_than_loop: float | None
    copies: float
    extra_memory: float | None
    error: float | None


def make_batch(rows: int, tokens: int) -> TensorDict:
    """Right-padded responses in TorchRL's keys, each terminated by its last token; a reward there."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(tokens // 2, tokens + 1, (rows, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    last = torch.arange(tokens) == lengths - 1
    value = torch.where(mask, torch.rand(rows, tokens, generator=generator), 0.0)
    reward = torch.where(last, (torch.rand(rows, 1, generator=generator) < 0.5).float(), 0.0)
    after = torch.cat([value[:, 1:], value.new_zeros(rows, 1)], 1)
    steps = {"state_value": after, "reward": reward, "done": last, "terminated": last.clone()}
    return TensorDict(
        {
            "state_value": value[..., None],
            "response_mask": mask,
            "next": {name: entry[..., None].contiguous() for name, entry in steps.items()},
        },
        batch_size=[rows, tokens],
    )


def make_call(contestant: str, batch: TensorDict) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed; returns advantage and value target, each [B, T, 1], except for the copy."""
    value, after = batch["state_value"], batch["next"]
    entries = after["state_value"], after["reward"], after["done"], after["terminated"]
    if contestant == "ours":
        estimator = LengthAdaptiveGAE(gamma=1.0, alpha=ALPHA)
        keys = estimator.tensor_keys.advantage, estimator.tensor_keys.value_target

        def ours() -> tuple[Tensor, ...]:
            result = estimator(batch)
            return tuple(result.pop(key) for key in keys)

        return ours
    if contestant == "copy":
        touched = value, *entries, batch["response_mask"], value, value  # the last two stand for the results
        return lambda: tuple(entry.clone() for entry in touched)
    estimate = {"loop": generalized_advantage_estimate, "vectorised": vec_generalized_advantage_estimate}[contestant]
    lmbda = row_lambda(batch).to(value.dtype).expand(value.shape)
    return lambda: estimate(1.0, lmbda, value, *entries)


def row_lambda(batch: TensorDict) -> Tensor:
    """[B, 1, 1] float64."""
    return length_adaptive_lambda(batch["response_mask"].sum(1), ALPHA)[:, None, None]


def error_of(contestant: str, results: tuple[Tensor, ...], batch: TensorDict) -> float:
    """The largest of advantage and target; ours has λ = 1 for the target, TorchRL's functions that of the advantage."""
    after, mask = batch["next"], batch["response_mask"]
    floats = [x.double() for x in (batch["state_value"], after["state_value"], after["reward"])]
    arguments = *floats, after["done"], after["terminated"]
    lmbdas = [row_lambda(batch)] if contestant != "ours" else [row_lambda(batch), torch.ones((), dtype=torch.float64)]
    oracles = [
        generalized_advantage_estimate(torch.ones((), dtype=torch.float64), lmbda, *arguments) for lmbda in lmbdas
    ]
    expected = oracles[0][0], oracles[-1][1]
    pairs = zip(results, expected, strict=True)
    return max(float((got - e)[mask].abs().max() / e[mask].abs().max()) for got, e in pairs)


def measure(contestant: str, rows: int, tokens: int) -> Measured:
    """Run in a process of its own."""
    with torch.no_grad():
        make_call(contestant, make_batch(4, 64))()  # what is loaded on the first call
        batch = make_batch(rows, tokens)
        call = make_call(contestant, batch)
        before = reset_peak()
        results, first_ms = timed(call)
        extra = None if before is None else status_kib("VmHWM") * 1024 - before
        error = None if contestant == "copy" else error_of(contestant, results, batch)
        del results
        times = [timed(call)[1] for _ in range(REPEATS[contestant])] if REPEATS[contestant] > 1 else [first_ms]
    inputs = sum(x.numel() * x.element_size() for x in batch.values(include_nested=True, leaves_only=True))
    return Measured(statistics.median(times), None if extra is None else extra / inputs, error)


def timed(call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], float]:
    """Results and milliseconds."""
    start = time.perf_counter()
    results = call()
    return results, 1000 * (time.perf_counter() - start)


def reset_peak() -> int | None:
    """Bytes in use now, the peak set back to them; None where that cannot be done (not Linux, a locked container)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return status_kib("VmRSS") * 1024
    except OSError:
        return None


def status_kib(field: str) -> int:
    """A field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def run_case(case: Case) -> list[Row]:
    """Every contestant, each in a process of its own."""
    measured: dict[str, Measured] = {}
    for contestant in case.contestants:
        arguments = ["--measure", contestant, str(case.rows), str(case.tokens)]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{contestant} failed on {case}:\n{done.stderr}")
        measured[contestant] = Measured(**json.loads(done.stdout))
        print(f"{case}, {contestant}: {measured[contestant].ms:,.1f} ms", file=sys.stderr, flush=True)

    def ratio(of: str, ms: float) -> float | None:
        return measured[of].ms / ms if of in measured else None

    return [
        Row(
            case.rows,
            case.tokens,
            name,
            m.ms,
            ratio("vectorised", m.ms),
            ratio("loop", m.ms),
            m.ms / measured["copy"].ms,
            m.extra_memory,
            m.error,
        )
        for name, m in measured.items()
    ]


def bounds(case: Case, ours: Row) -> list[tuple[str, bool]]:
    """What is demanded of ours, and whether it holds; a number that could not be measured does not."""
    found = []
    for what, got, sign, bound in (
        ("times faster than the vectorised form", ours.faster_than_vectorised, ">=", case.least_over_vectorised),
        ("times faster than the loop", ours.faster_than_loop, ">=", case.least_over_loop),
        ("times a copy", ours.copies, "<=", case.most_copies),
        ("times the inputs of extra memory", ours.extra_memory, "<=", MOST_MEMORY),
        ("relative error", ours.error, "<=", MOST_ERROR),
    ):
        if bound is not None:
            holds = got is not None and (got >= bound if sign == ">=" else got <= bound)
            shown = "not measured" if got is None else f"{got:,.3g}"
            found.append((f"{case}: {shown} {what} (demanded {sign} {bound:g})", holds))
    return found


def print_table(rows: list[Row]) -> None:
    """All rows as text."""
    titles = ("ms", "× vectorised", "× loop", "copies", "extra memory", "error")
    print(f"\n{'':<32}" + "".join(f"{title:>14}" for title in titles))
    for row in rows:
        numbers = (row.faster_than_vectorised, row.faster_than_loop, row.copies, row.extra_memory)
        texts = [f"{row.ms:,.2f}", *("–" if x is None else f"{x:,.3g}" if x < 100 else f"{x:,.0f}" for x in numbers)]
        texts.append("–" if row.error is None else f"{row.error:.1e}")
        print(f"{f'B {row.rows} × T {row.tokens}  {row.contestant}':<32}" + "".join(f"{text:>14}" for text in texts))


def main(arguments: list[str]) -> int:
    """Runs it, prints the table and whether each bound holds, writes rows."""
    parser = command_line(__doc__)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "B", "T"), help="one number, as JSON (used by itself)")
    options = parse(parser, arguments)
    if options.measure is not None:
        contestant, rows, tokens = options.measure
        print(json.dumps(asdict(measure(contestant, int(rows), int(tokens)))))
        return 0
    before = environment()
    announce(before)
    table: list[Row] = []
    found: list[tuple[str, bool]] = []
    for case in QUICK if options.quick else FULL:
        rows = run_case(case)
        table += rows
        found += bounds(case, next(row for row in rows if row.contestant == "ours"))
    print_table(table)
    print()
    print_bounds(found)
    if options.json is not None:
        environments = {"environment": before, "load_average_after": environment()["load_average"]}
        checks = [{"bound": text, "holds": holds} for text, holds in found]
        written = {**environments, "gae": [asdict(row) for row in table], "bounds": checks}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
