"""Runs ``scripts/train_async.py`` in a process of its own, as a user does."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from conftest import REPOSITORY, tiny_overrides
from safetensors.torch import load_file
from torch import Tensor

from vapo_async.checkpoint import list_checkpoints
from vapo_async.launcher.schedule import SCHEDULE_FILE

SCRIPT = REPOSITORY / "scripts" / "train_async.py"
FEW_PROBLEMS = "task.train_problems=400"  # drawing 20,000 takes a second, in every process that needs some


def command(base_folder: Path, runs_dir: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(SCRIPT),
        *tiny_overrides(base_folder, runs_dir),
        FEW_PROBLEMS,
        *more,
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(log: Path, text: str, process: "subprocess.Popen[str] | Run", timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def newest_run(runs_dir: Path) -> Path:
    return sorted((runs_dir / "tiny").iterdir())[-1]


def checkpoint_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of the run's last checkpoint: policy, critic, optimizers, random states, flow, engine."""
    last = list_checkpoints(run_dir)[-1]
    return {
        f"{path.relative_to(last)}/{key}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """Two runs ended with the same weights, states and totals."""
    found, expected = checkpoint_tensors(run_dir), checkpoint_tensors(reference)
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (run_dir, reference)]
    for key in ("versions", "generated_tokens", "trained_tokens", "tickets", "age_histogram", "final_accuracy"):
        assert ends[0][key] == ends[1][key], key
    assert (run_dir / SCHEDULE_FILE).read_text() == (reference / SCHEDULE_FILE).read_text()


class Run:
    """A run that a :class:`Nursery` forked: what ``subprocess.Popen`` would be."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self._exit = log.with_name(log.name + ".exit")

    def poll(self) -> int | None:
        return int(self._exit.read_text()) if self._exit.exists() else None

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Nursery:
    """Forks runs out of a process that has imported everything: each is up in a fraction of a second."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("nursery.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()
        self._runs: list[Run] = []

    def start(self, arguments: list[str], log: Path) -> Run:
        """``arguments`` of ``scripts/train_async.py``; what it prints goes into ``log``."""
        assert self._process.stdin is not None
        log.with_name(log.name + ".exit").unlink(missing_ok=True)
        log.write_text("")
        self._process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}) + "\n")
        self._process.stdin.flush()
        self._runs.append(Run(int(self._read()), log))
        return self._runs[-1]

    def close(self) -> None:
        """Ends it and the runs that are left."""
        for run in self._runs:
            if run.poll() is None:
                run.kill()
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@functools.cache
def nursery() -> Nursery:
    """The one that all tests share."""
    shared = Nursery()
    atexit.register(shared.close)
    return shared
