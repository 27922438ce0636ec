"""A discrete-event simulation of engines and learner around the real buffer: which bound S and lead L for a cluster?

    python benchmarks/simulate.py --json simulate.json      three minutes on one core: demands, then one cluster
    python benchmarks/simulate.py --quick                   seconds: does it run?
    python benchmarks/simulate.py --cluster benchmarks/clusters/laptop.yaml --png laptop.png      one cluster only

Tickets, deadlines and ages are those of ``RolloutBuffer``; lengths, decoding, prefill, weight updates, failures and
learning are modelled (``vapo_async/simulation/cluster.py`` says by which numbers), in virtual time. The verifier takes
none. Every run has a seed, and the i-th prompt the same lengths for all S and L. Numbers are medians over seeds.

Demanded: (a) the throughput of a worker does not fall from 64 workers to 4,096; (b) with stages that take equally long,
the run takes hardly longer than one of them; (c) under heavy tails a small lead below a large bound has the throughput
of the large lead at the age of the small one, with unlimited engines and with slots for which all tickets queue.
Not demanded where an engine takes a ticket only for a free slot: S = L has slack there, and the table shows its gain.
Exit code 1 where a demand fails.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench import announce, command_line, environment, parse
from simulation import demands, tails
from simulation.demands import Check
from simulation.picture import draw

from vapo_async.config import ConfigError
from vapo_async.simulation import sweep
from vapo_async.simulation.cluster import Cluster, read_cluster

DEFAULT_CLUSTER = Path(__file__).parent / "clusters" / "one_node_8xh100.yaml"


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    workers: tuple[int, ...]
    scaling_versions: tuple[int, int]
    """All of them, and how many at the start are not measured."""
    scaling_seeds: int
    overlap_versions: int
    overlap_seeds: int
    tail_cases: tuple[tuple[int, float, int], ...]
    """B, σ, seeds."""
    tail_versions: int
    levels: tuple[int, ...]
    sweep_versions: tuple[int, int]
    sweep_seeds: int


FULL = Sizes(
    (2, 8, 64, 512, 4096),
    scaling_versions=(12, 4),
    scaling_seeds=3,
    overlap_versions=60,
    overlap_seeds=3,
    tail_cases=((8, 0.7, 5), (8, 1.5, 9), (32, 1.5, 5)),
    tail_versions=150,
    levels=sweep.LEVELS,
    sweep_versions=(32, 8),
    sweep_seeds=3,
)
QUICK = Sizes(
    (2, 8),
    scaling_versions=(4, 1),
    scaling_seeds=1,
    overlap_versions=4,
    overlap_seeds=1,
    tail_cases=((2, 0.7, 1),),
    tail_versions=5,
    levels=(0, 1, 2),
    sweep_versions=(3, 1),
    sweep_seeds=1,
)
OVERLAP_PAIRS = ((0, 0), (1, 1), (2, 1), (2, 2), (4, 2), (8, 2))


def tell(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def run_demands(sizes: Sizes) -> tuple[dict[str, list[dict[str, object]]], list[Check]]:
    """(c), (b) and (a), printed as tables; nothing is demanded of the minimal setting."""
    heavy, found = tails.tails(sizes.tail_cases, sizes.tail_versions, tell)
    print(f"\nheavy tails, {sizes.tail_versions} versions\n{tails.table(heavy)}", flush=True)
    overlap, more = demands.overlaps(OVERLAP_PAIRS, sizes.overlap_versions, sizes.overlap_seeds, tell)
    print(f"\nbalanced stages\n{demands.table(overlap)}", flush=True)
    scale, last = demands.scaling(sizes.workers, *sizes.scaling_versions, sizes.scaling_seeds, tell)
    print(f"\nweak scaling, S = 4, L = 2\n{demands.table(scale)}", flush=True)
    rows = {name: [asdict(row) for row in part] for name, part in
            (("heavy_tails", heavy), ("overlap", overlap), ("scaling", scale))}  # fmt: skip
    return rows, [] if sizes.workers == QUICK.workers else found + more + last


def run_sweep(cluster: Cluster, sizes: Sizes, png: Path | None) -> dict[str, object]:
    """The plane of one cluster: table, recommended pair, picture."""
    versions, warm_up = sizes.sweep_versions
    pairs = sweep.sweep(
        cluster,
        levels=sizes.levels,
        versions=versions,
        warm_up=warm_up,
        seeds=sizes.sweep_seeds,
        tell=lambda pair: tell(f"S {pair.max_staleness}, L {pair.lead}: {pair.groups_per_s:,.3g} groups/s"),
    )
    print(f"\n{sweep.describe(cluster, pairs)}", flush=True)
    if png is not None:
        draw(cluster, pairs, png)
    return {
        "cluster": asdict(cluster),
        "pairs": [asdict(pair) for pair in pairs],
        "recommended": asdict(sweep.recommend(pairs)),
        "pareto": [[pair.max_staleness, pair.lead] for pair in sweep.pareto(pairs)],
    }


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Options; ``cluster=FILE`` is ``--cluster FILE``."""
    arguments = [part for text in arguments for part in _option(text)]
    parser = command_line(__doc__)
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the (S, L) plane of the cluster there")
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="a cluster's YAML; leaves the demands out")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each S and L of the cluster (default: 3)")
    options = parse(parser, arguments)
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds is {options.seeds}, expected at least 1")
    return options


def _option(text: str) -> list[str]:
    return ["--cluster", text.removeprefix("cluster=")] if text.startswith("cluster=") else [text]


def main(arguments: list[str]) -> int:
    """Runs it, prints tables and whether each demand holds, writes rows and picture."""
    options = options_of(arguments)
    try:
        cluster = read_cluster(options.cluster or DEFAULT_CLUSTER)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    before, started, sizes = environment(), time.perf_counter(), QUICK if options.quick else FULL
    sizes = sizes if options.seeds is None else replace(sizes, sweep_seeds=options.seeds)
    announce(before)
    rows, checks = ({}, []) if options.cluster else run_demands(sizes)
    plane = run_sweep(cluster, sizes, options.png)
    seconds = time.perf_counter() - started
    print(f"\n{seconds:.0f} s, {time.process_time():.0f} of them on the CPU\n")
    for check in checks:
        print(f"{'holds' if check.holds else 'FAILS':<6} {check.text}")
    if options.json is not None:
        written = {
            "environment": before,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time(), 1),
            **rows,
            "sweep": plane,
        }
        written["demands"] = [asdict(check) for check in checks]
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
