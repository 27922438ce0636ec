"""Runs ``scripts/train_async.py`` in a process of its own, as a user does."""

import subprocess
import sys
import time
from pathlib import Path

from conftest import REPOSITORY, tiny_overrides

SCRIPT = REPOSITORY / "scripts" / "train_async.py"


def command(base_folder: Path, runs_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(SCRIPT),
        *tiny_overrides(base_folder, runs_dir),
        *more,
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(log: Path, text: str, process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def newest_run(runs_dir: Path) -> Path:
    return sorted((runs_dir / "tiny").iterdir())[-1]
