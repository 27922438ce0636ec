"""One process: killed and resumed, it must end as the run that nobody disturbed.

The launcher is imported here, and not used: forks have it then.
"""

import random
import runpy
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import vapo_async.launcher.run  # noqa: F401
from killing.checks import same
from killing.runs import JUDGE, SCRIPT, ForkedRun, Report, family, kill, settings, tell, wait

TARGETS = ("process", "judge", "checkpoint")


def inline(scratch: Path, kills: int, seed: int) -> Report:
    """An undisturbed run beside one that is killed ``kills`` times."""
    torch.set_num_threads(1)
    main = runpy.run_path(str(SCRIPT))["main"]
    chance = random.Random(seed)
    report = Report("inline", versions=8 * kills + 12)
    overrides = settings(scratch / "model", scratch / "reference", "inline", report.versions)
    overrides.append("launcher.overlap_steps=4")
    since = time.perf_counter()
    log = scratch / "reference.log"
    if wait(ForkedRun(main, overrides, log)) != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    reference_s = time.perf_counter() - since
    tell(f"inline: {report.versions} versions undisturbed in {reference_s:.1f} s")
    runs_dir = scratch / "killed"
    overrides = [o for o in overrides if not o.startswith("runs_dir=")] + [f"runs_dir={runs_dir}", "resume=auto"]
    run = None
    targets = [TARGETS[i % len(TARGETS)] for i in range(kills)]
    chance.shuffle(targets)
    left = list(targets)
    log, code = scratch / "killed.log", None
    while left or code is None:
        if run is None:
            run, report.starts = ForkedRun(main, overrides, log), report.starts + 1
        if not left:
            code = wait(run)
            break
        target = left[0]
        moment = time.monotonic() + chance.uniform(0.0, 1.0 + reference_s / max(1, kills))
        code = wait(run, lambda moment=moment: time.monotonic() > moment)
        if target == "checkpoint" and code is None:
            code = wait(run, lambda: being_written(runs_dir))
        if code is not None:
            break  # it ended before its next kill
        if target == "judge":
            judges = family(run.pid, JUDGE)
            for pid in judges:
                kill(pid)
            if not judges:
                continue  # not up yet
        else:
            kill(run.pid)
            wait(run)
            run = None
            if target == "checkpoint" and not being_written(runs_dir):
                continue  # it was whole a moment before
        left.pop(0)
    report.seconds = time.perf_counter() - since - reference_s
    report.kills = dict(Counter(targets[: len(targets) - len(left)]))
    report.checks.append((f"the run ends with exit code 0 after {len(targets) - len(left)} kills", code == 0))
    report.checks.append((f"all {kills} kills were made", not left))
    if code == 0:
        report.checks += same(scratch / "reference", runs_dir, report.versions)
    else:
        print(log.read_text()[-3000:], file=sys.stderr)
    return report


def being_written(runs_dir: Path) -> bool:
    return any(runs_dir.glob("chaos/*/checkpoints/.step_*.partial"))
