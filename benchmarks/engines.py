"""Speed of the embedded engine, vLLM, Transformers' continuous batching and ``generate``; what a weight update costs.

    python benchmarks/engines.py --json engines.json              six minutes on two cores
    python benchmarks/engines.py --smollm2 --json engines.json    25 minutes: SmolLM2-135M too
    python benchmarks/engines.py --quick                          does it run? most of the half minute is vLLM's start

The tiny model has random weights in the shape of the embedded one. Every engine gets the same prompts and the same
number of tokens to write for each (no end token is ever sampled), keeps at most ``concurrency`` responses in flight,
samples at T = 1 in float32 and returns log-probs. Lengths are *uniform* (all the same) or *long-tailed* (log-normal,
σ = 1). Only tokens that were asked for count: ``generate`` runs a batch until its longest response ends. All engines
take turns within each repeat; the tables show medians.

Each engine has one torch thread. vLLM's is in a process of its own, whose requests and results a thread of this process
handles beside it; CPU-seconds are those of all its processes. A busy machine disturbs them less than the clock.

Updates: *stands still* is the time without a decode step, *load* the call with the weights in the file that vLLM reads,
*call* with the writing of that file, during which vLLM goes on. *Lost* is by how much longer a run with one update
took, so that keys computed anew and cores taken from generation are in it. ``generate`` takes new weights between two
batches only.
"""

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from bench import announce, command_line, environment, parse, print_bounds
from engine_speed.progress import Progress, run_estimate_s
from engine_speed.runners import ENGINES, VLLM, Setting, running
from engine_speed.speeds import SpeedRow, speed_rows
from engine_speed.stalls import StallRow, stall_rows
from engine_speed.tables import bounds, speed_table, stall_table
from engine_speed.workloads import LENGTHS, QUICK, SMOLLM2, TINY, Sizes, make_workload, update_workload
from transformers import PreTrainedModel

from vapo_async.collector.vllm_environment import INSTALL, prepare_vllm
from vapo_async.config import EmbeddedModelConfig, SmolLM2ModelConfig
from vapo_async.models.load import load_policy
from vapo_async.models.pretrain import new_model
from vapo_async.models.smollm2 import ensure_smollm2
from vapo_async.weights.mailbox import published_tensors

THREADS = 1


@dataclass(frozen=True)
class Benchmarked:
    """A model and how much is run with it."""

    name: str
    model: PreTrainedModel
    folder: Path
    sizes: Sizes


def options_of(arguments: list[str]) -> argparse.Namespace:
    """Options; without ``--engines`` vLLM is left out where it is not installed."""
    parser = command_line(__doc__)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M too")
    parser.add_argument(
        "--engines", nargs="+", choices=tuple(ENGINES), metavar="ENGINE", help=f"of {', '.join(ENGINES)}"
    )
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=LENGTHS, help="default: both")
    parser.add_argument("--concurrency", nargs="+", type=int, metavar="N", help="responses in flight, of every model")
    parser.add_argument("--repeats", type=int, metavar="N", help="of every speed, and rounds of updates")
    options = parse(parser, arguments)
    for name, least in (("concurrency", 2), ("repeats", 1)):
        values = getattr(options, name)
        wrong = [n for n in (values if isinstance(values, list) else [values]) if n is not None and n < least]
        if wrong:
            parser.error(f"--{name} is {wrong[0]}, expected at least {least}")
    installed = importlib.util.find_spec("vllm") is not None
    if options.engines is None:
        options.engines = [engine for engine in ENGINES if installed or engine != VLLM]
        if not installed:
            print(f"vLLM is not installed and left out; {INSTALL.split(', or')[0]}")
    elif VLLM in options.engines and not installed:
        parser.error(f"vLLM is not installed; {INSTALL.split(', or')[0]}")
    return options


def sizes_of(options: argparse.Namespace, full: Sizes) -> Sizes:
    """``full`` as the command line wants it."""
    sizes = QUICK if options.quick else full
    if options.concurrency:
        sizes = replace(sizes, concurrency=tuple(options.concurrency))
    if options.repeats:
        sizes = replace(sizes, repeats=options.repeats, update_rounds=options.repeats)
    return sizes


def benchmarked_of(options: argparse.Namespace, scratch: Path) -> list[Benchmarked]:
    """The models, in this process and on disk."""
    tiny = new_model(EmbeddedModelConfig()).eval()
    tiny.save_pretrained(scratch)
    found = [Benchmarked("tiny", tiny, scratch, sizes_of(options, TINY))]
    if options.smollm2:
        folder = ensure_smollm2(SmolLM2ModelConfig(), print)
        found.append(Benchmarked("smollm2", load_policy(folder, "float32"), folder, sizes_of(options, SMOLLM2)))
    return found


def estimate_s(benchmarked: Benchmarked, engines: Sequence[str], kinds: Sequence[str]) -> float:
    """Of all that is run with one model."""
    name, sizes = benchmarked.name, benchmarked.sizes
    seconds = 0.0
    for concurrency in sizes.concurrency:
        update = update_workload(concurrency, sizes)
        for key in engines:
            engine = ENGINES[key]
            speeds = sum(run_estimate_s(name, key, concurrency, make_workload(k, concurrency, sizes)) for k in kinds)
            updates = (1 + len(engine.kv_cache)) * run_estimate_s(name, key, concurrency, update)
            seconds += engine.start_s + sizes.repeats * speeds + sizes.update_rounds * updates
    return seconds


def measure(
    benchmarked: Benchmarked, engines: Sequence[str], kinds: Sequence[str], progress: Progress
) -> tuple[list[SpeedRow], list[StallRow]]:
    """Every concurrency of one model."""
    name, sizes = benchmarked.name, benchmarked.sizes
    weights = published_tensors(benchmarked.model)
    speeds: list[SpeedRow] = []
    stalls: list[StallRow] = []
    for concurrency in sizes.concurrency:
        setting = Setting(benchmarked.model, benchmarked.folder, concurrency, sizes.max_length)
        with running(engines, setting) as runners:
            progress.done(f"{name}, {concurrency} in flight: started", sum(ENGINES[key].start_s for key in engines))
            for lengths in kinds:
                work = make_workload(lengths, concurrency, sizes)
                speeds += speed_rows(name, lengths, concurrency, runners, work, sizes.repeats, progress)
            work = update_workload(concurrency, sizes)
            stalls += stall_rows(name, concurrency, runners, work, sizes.update_rounds, weights, progress)
    return speeds, stalls


def main(arguments: list[str]) -> int:
    """Runs it, prints the tables and whether each bound holds, writes rows. 1 if one does not hold."""
    options = options_of(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    versions = {"transformers": transformers.__version__}
    if VLLM in options.engines:
        prepare_vllm("cpu", THREADS)
        versions["vllm"] = importlib.import_module("vllm").__version__
    before = environment(**versions)
    announce(before)
    speeds: list[SpeedRow] = []
    stalls: list[StallRow] = []
    with tempfile.TemporaryDirectory(prefix="vapo-async-engines-") as scratch:
        models = benchmarked_of(options, Path(scratch))
        progress = Progress(sum(estimate_s(model, options.engines, options.lengths) for model in models))
        for model in models:
            of_model = measure(model, options.engines, options.lengths, progress)
            speeds += of_model[0]
            stalls += of_model[1]
    print(f"\n{speed_table(speeds)}\n\n{stall_table(stalls)}\n")
    found = [] if options.quick else bounds(speeds, stalls)
    print_bounds(found)
    if options.json is not None:
        written = {
            "environment": before,
            "load_average_after": environment()["load_average"],
            "speed": [asdict(row) for row in speeds],
            "weight_update": [asdict(row) for row in stalls],
            "bounds": [{"bound": text, "holds": holds} for text, holds in found],
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if all(holds for _, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
