"""Many processes: the run survives most deaths of its parts, and is resumed after the others."""

import random
import sys
import time
from collections import Counter
from pathlib import Path

from killing.checks import ledger_checks
from killing.runs import JUDGE, Report, SpawnedRun, family, kill, run_dir_of, settings, tell, wait

TARGETS = {
    "rollout worker": r"ray::RolloutActor",
    "verifier": r"ray::VerifierActor",
    "judge": JUDGE,
    "evaluator": r"ray::EvaluatorActor",
    "learner": r"ray::LearnerActor",
}


def ray(scratch: Path, kills: int, seed: int) -> Report:
    """A run whose actors are killed ``kills`` times."""
    chance = random.Random(seed)
    report = Report("ray", versions=8 * kills + 10)
    runs_dir, log = scratch / "ray", scratch / "ray.log"
    overrides = settings(scratch / "model", runs_dir, "ray", report.versions)
    overrides += ["launcher.rollout_workers=2", f"launcher.max_restarts={kills}", "resume=auto", "checkpoint.every=4"]
    names = list(TARGETS)
    left = [names[i % len(names)] for i in range(kills)]
    chance.shuffle(left)
    made: list[str] = []
    since, run, code, ends = time.perf_counter(), None, None, 0
    while code != 0 and ends <= kills + 3:
        if run is None:
            run, report.starts = SpawnedRun(overrides, log), report.starts + 1
        if left:
            before = rows_written(runs_dir)
            code = wait(run, lambda before=before: rows_written(runs_dir) > before)  # it works, again
            moment = time.monotonic() + chance.uniform(0.0, 2.0)
            code = wait(run, lambda moment=moment: time.monotonic() > moment) if code is None else code
            victims = family(run.pid, TARGETS[left[0]])
            if code is None and victims:
                kill(chance.choice(victims))
                made.append(left.pop(0))
                tell(f"ray: killed the {made[-1]} ({len(made)} of {kills})")
        else:
            code = wait(run)
        if code is not None:
            run, ends = None, ends + 1
            tell(f"ray: the run ended with exit code {code}")
    if run is not None and run.poll() is None:
        kill(run.pid)
    report.seconds, report.kills = time.perf_counter() - since, dict(Counter(made))
    report.checks.append((f"the run ends with exit code 0 after {len(made)} kills", code == 0))
    report.checks.append((f"all {kills} kills were made", not left))
    run_dir = run_dir_of(runs_dir)
    if code == 0 and run_dir is not None:
        report.checks += ledger_checks(run_dir, report.versions)
    else:
        print(log.read_text()[-3000:], file=sys.stderr)
    return report


def rows_written(runs_dir: Path) -> int:
    """Batches that the run has noted down, repeated ones too."""
    run_dir = run_dir_of(runs_dir)
    ledger = None if run_dir is None else run_dir / "flow.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger is not None and ledger.exists() else 0
