"""``pytest -m gpu tests``: what of the software runs on a GPU only."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gpu_parts.sections import Line, Report, Task

REPOSITORY: Final = Path(__file__).parents[2]
NAMED: Final = 5
"""Failures that the reason names; the rest is counted."""


@dataclass(frozen=True)
class Checks:
    """How the tests ended."""

    passed: int
    failed: tuple[str, ...]
    """Names, with errors in fixtures and in collecting."""
    skipped: dict[str, str]
    """By name, why."""


def measure(task: Task, report: Report) -> None:
    """Raises RuntimeError where one fails, or there is none."""
    checks = run_checks(["tests"], REPOSITORY, task.scratch / "gpu_tests.xml")
    why = "; ".join(sorted(set(checks.skipped.values())))
    told = f"{checks.passed} passed, {len(checks.failed)} failed, {len(checks.skipped)} skipped"
    report(Line("pytest -m gpu", "", told + (f" ({why})" if why else ""), asdict(checks)))
    if checks.failed:
        more = f" and {len(checks.failed) - NAMED} more" if len(checks.failed) > NAMED else ""
        raise RuntimeError(f"failed: {', '.join(checks.failed[:NAMED])}{more}")
    if not checks.passed:
        raise RuntimeError("no test marked gpu passed")


def run_checks(paths: Sequence[str], folder: Path, xml: Path) -> Checks:
    """Args:
    paths: of tests, seen from ``folder``.
    folder: that pytest runs in.
    xml: where its results go.

    Raises:
        RuntimeError: pytest wrote no results.
    """
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *paths], cwd=folder, stdout=subprocess.PIPE)
    if not xml.exists():
        written = done.stdout.decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"pytest ended with {done.returncode} and no results: {written[-1] if written else ''}")
    passed, failed, skipped = 0, [], {}
    for case in ElementTree.parse(xml).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}".removeprefix("::")
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif skip is not None:
            skipped[name] = skip.get("message", "")
        else:
            passed += 1
    return Checks(passed, tuple(failed), skipped)
