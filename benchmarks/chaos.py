"""Runs that are killed with -9 again and again: nothing is lost, nothing is trained on twice, the weights are the same.

    python benchmarks/chaos.py --kills 20 --json chaos.json     about six minutes on two cores
    python benchmarks/chaos.py --kills 3 --only inline          half a minute

*inline*: a run that nobody disturbs, and one of the same seed whose process or judge (the verifier's worker process) is
killed at random moments, also while it writes a checkpoint. It is resumed with ``resume=auto`` each time, and has to
end with the same weights, bit for bit, the same schedule and the same counts.

*ray*: rollout worker, verifier, judge, evaluator and learner are killed at random moments. What the run survives it has
to survive; where it ends it is resumed with ``resume=auto``. At its end every ticket is accounted for, none was trained
on twice, and no group was older than allowed.

The moments are drawn from ``--seed``; what they hit is up to the machine. The model is random and tiny.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import announce, command_line, environment, parse
from killing.inline_run import inline
from killing.ray_run import ray
from killing.runs import Report, make_model

LAUNCHERS: dict[str, Callable[[Path, int, int], Report]] = {"inline": inline, "ray": ray}


def main(arguments: list[str]) -> int:
    """Exit code: 0 all holds, 1 something does not."""
    parser = command_line(__doc__, quick=False)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of each launcher's run")
    parser.add_argument("--only", choices=tuple(LAUNCHERS), help="one launcher")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parse(parser, arguments)
    before = environment()
    announce(before)
    reports: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="vapo-async-chaos-") as name:
        scratch = Path(name)
        make_model(scratch / "model")
        for launcher, run in LAUNCHERS.items():
            if options.only in (None, launcher):
                reports.append(run(scratch, options.kills, options.seed))
    print(f"\n{'':<10}{'kills':>8}{'starts':>8}{'versions':>10}{'seconds':>10}  what was killed")
    for report in reports:
        numbers = f"{sum(report.kills.values()):>8}{report.starts:>8}{report.versions:>10}{report.seconds:>10.1f}"
        print(f"{report.launcher:<10}{numbers}  {', '.join(f'{n} × {name}' for name, n in report.kills.items())}")
    print()
    for report in reports:
        for text, holds in report.checks:
            print(f"{'holds' if holds else 'FAILS':<6} {report.launcher}: {text}")
    if options.json is not None:
        written: dict[str, Any] = {"environment": before, "chaos": [asdict(report) for report in reports]}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if all(holds for report in reports for _, holds in report.checks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
