"""Plans a run for a cluster: ``python scripts/plan.py experiment=… cluster=…``; see ``--help``."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vapo_async.config import Config, ConfigError, resolved_lead
from vapo_async.config.load import load_config
from vapo_async.launcher.preflight import check_trainable
from vapo_async.planning.cluster import read_cluster
from vapo_async.planning.lengths import LARGEST_MEDIAN, LARGEST_SIGMA, ResponseLengths

USAGE = """\
usage: python scripts/plan.py cluster=NAME_OR_FILE [experiment=…] [group=choice …] [section.key=value …]

Says what a run needs of a cluster and how fast it would be, by stated models, without starting anything: memory of
each GPU by component, tokens/s, time of a step and of a publication, and which staleness bound S and lead L the
simulation recommends. What does not fit is told in one line each, with exit code 1.
  python scripts/plan.py experiment=paper_qwen2.5_32b cluster=h100_64
  python scripts/plan.py experiment=paper_qwen2.5_32b cluster=h100_128 learner.ranks=80 launcher.rollout_workers=11
  python scripts/plan.py cluster=laptop                                  the default run
  python scripts/plan.py experiment=… cluster=my_cluster.yaml            start from a copy of configs/cluster/*.yaml

  --median-tokens N   of a response (default: a fifth of task.max_response_tokens); lengths are log-normal
  --sigma X           standard deviation of their logarithm, at most 5 (default: 0.8)
  --prompt-tokens N   of a prompt, at most task.max_prompt_tokens (default: 200, or that where it is less)
  --no-simulation     leaves the recommended S and L out
  --json FILE         writes all numbers there, too: bytes, seconds, tokens
Groups and keys are those of python scripts/train_async.py --help.
"""
PAIRS = ((0, 0), (1, 1), (2, 1), (2, 2), (4, 2), (6, 4))
"""S and L that are simulated."""
NUMBERS = {"--median-tokens": (1.0, LARGEST_MEDIAN), "--sigma": (0.0, LARGEST_SIGMA), "--prompt-tokens": (0.0, 1e9)}
"""The least and the most of each."""
RESPONSES = 50_000
"""Simulated for each of them, about; the first third is not measured."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 fits, 1 does not fit, 2 a mistake in what was asked for, 130 interrupted."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE, end="")
        return 0
    try:
        return _plan(*_split(arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _plan(overrides: list[str], cluster_name: str, options: dict[str, float], simulated: bool, out: Path | None) -> int:
    config, cluster = load_config(overrides), read_cluster(cluster_name)
    check_trainable(config)
    from vapo_async.planning import fit, report  # imports torch
    from vapo_async.planning.plan import make_plan

    lengths = _lengths(config, options)
    plan = make_plan(config, cluster, lengths)
    found = fit.misfits(config, plan)
    print(report.plan_text(config, plan))
    told = report.layout_note(plan, fit.best_layout(config, plan, lengths), fits=not found)
    told += [] if found else report.notes(config, plan)
    data: dict[str, Any] = report.plan_data(plan, found, told)
    if simulated and not found:
        data["simulation"], slow = _simulate(config, plan)
        told += slow
    for note in told:
        print(f"note: {note}")
    if out is not None:
        out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")
    for misfit in found:
        print(f"does not fit: {misfit.text}", file=sys.stderr)
    return 1 if found else 0


def _lengths(config: Config, options: dict[str, float]) -> ResponseLengths:
    task = config.task
    prompt = options.get("--prompt-tokens", min(200, task.max_prompt_tokens))
    if prompt > task.max_prompt_tokens:
        raise ConfigError(
            f"--prompt-tokens is {prompt:g}, expected at most task.max_prompt_tokens = {task.max_prompt_tokens}"
        )
    return ResponseLengths(
        options.get("--median-tokens", max(1.0, task.max_response_tokens / 5)),
        options.get("--sigma", 0.8),
        task.max_response_tokens,
        prompt,
    )


def _simulate(config: Config, plan: Any) -> tuple[dict[str, Any], list[str]]:
    """Prints which S and L to take; all pairs as plain data, and a note where those of the configuration are slow."""
    import torch

    from vapo_async.planning import report
    from vapo_async.planning.simulated import simulated_cluster
    from vapo_async.simulation.cluster import parse_cluster
    from vapo_async.simulation.run import simulate
    from vapo_async.simulation.sweep import GOOD_ENOUGH, Pair, recommend

    torch.set_num_threads(1)
    cluster = parse_cluster(simulated_cluster(config, plan))
    responses = cluster.batch.groups * cluster.batch.group_size
    versions = min(32, max(6, RESPONSES // responses))
    settings = {"versions": versions, "warm_up": versions // 3, "seed": 0}
    configured = (config.buffer.max_staleness, resolved_lead(config.buffer))
    asked = dict.fromkeys((*PAIRS, configured))
    pairs = [Pair.of(bound, lead, [simulate(cluster, bound, lead, **settings)]) for bound, lead in asked]
    taken, best = recommend(pairs), max(pair.groups_per_s for pair in pairs)
    own = next(pair for pair in pairs if (pair.max_staleness, pair.lead) == configured)
    step_s = cluster.batch.groups / own.groups_per_s
    print(
        f"\nsimulated\n  take buffer.max_staleness={taken.max_staleness} buffer.lead={taken.lead}: "
        f"{taken.groups_per_s / best:.0%} of the best throughput at a mean age of {taken.mean_age:.2f}\n"
        f"  as configured, S = {own.max_staleness} and L = {own.lead}: {own.groups_per_s / best:.0%}, mean age "
        f"{own.mean_age:.2f}; a step in {report.duration(step_s)}, learner idle {own.learner_idle:.0%}\n"
        f"  the whole run: {report.run_text(config, plan, step_s)}"
    )
    slow = []
    if own.groups_per_s < GOOD_ENOUGH * best:
        slow.append(
            f"buffer.max_staleness={own.max_staleness} with buffer.lead={own.lead} reaches "
            f"{own.groups_per_s / best:.0%} of the best throughput, {taken.max_staleness} with {taken.lead} "
            f"{taken.groups_per_s / best:.0%}"
        )
    return {"recommended": asdict(taken), "configured": asdict(own), "pairs": [asdict(p) for p in pairs]}, slow


def _split(arguments: list[str]) -> tuple[list[str], str, dict[str, float], bool, Path | None]:
    """Overrides, cluster, options with numbers, whether to simulate, file of ``--json``."""
    overrides: list[str] = []
    numbers: dict[str, float] = {}
    cluster, simulated, out = "", True, None
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--no-simulation":
            simulated = False
        elif name in NUMBERS:
            numbers[name] = _number(name, value if equals else next(rest, ""))
        elif name == "--json":
            out = _writable(value if equals else next(rest, ""))
        elif name == "cluster":
            cluster = value
        else:
            overrides.append(argument)
    if not cluster:
        raise ConfigError("which cluster? give cluster=NAME, one of configs/cluster/, or cluster=FILE.yaml")
    return overrides, cluster, numbers, simulated, out


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    least, most = NUMBERS[name]
    if not least <= value <= most:
        raise ConfigError(f"{name} needs a number between {least:g} and {most:g}, found '{text}'")
    return value


def _writable(name: str) -> Path:
    path = Path(name).expanduser()
    if not name or path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"--json needs a file in a folder that can be written, found '{name}'")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
