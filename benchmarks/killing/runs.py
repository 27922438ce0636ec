"""The tiny run as a process that can be waited for and killed, and where it writes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_async.py"
MAX_STALENESS = 4
JUDGE = r"vapo_async\.verifier\.worker"
"""The verifier's worker process, by its command line."""
LIMIT_S = 300.0
"""For one start of a run; a benchmark that hangs says so."""


@dataclass
class Report:
    """What happened to one launcher's run."""

    launcher: str
    kills: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    versions: int = 0
    seconds: float = 0.0
    checks: list[tuple[str, bool]] = field(default_factory=list)


def settings(folder: Path, runs_dir: Path, launcher: str, versions: int) -> list[str]:
    """A run of ``versions`` batches, one of them value pretraining, with a checkpoint after every other one."""
    return [
        "model=folder",
        f"model.path={folder}",
        f"runs_dir={runs_dir}",
        f"launcher={launcher}",
        "name=chaos",
        f"steps={versions - 1}",
        "algorithm.groups_per_batch=2",
        "algorithm.group_size=4",
        "algorithm.minibatches=2",
        "algorithm.value_pretraining_steps=1",
        "task.max_response_tokens=24",
        "task.heldout_problems=8",
        "task.train_problems=400",
        "engine.max_slots=10",
        f"buffer.max_staleness={MAX_STALENESS}",
        "buffer.lead=2",
        "evaluation.problems=4",
        "evaluation.samples=2",
        "evaluation.every=10",
        "checkpoint.every=2",
    ]


def make_model(folder: Path) -> None:
    """A random policy of 0.1M parameters with the character tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vapo_async.models.char_tokenizer import build_char_tokenizer

    tokenizer = build_char_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    policy = Qwen2ForCausalLM(config).eval()
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class ForkedRun:
    """``scripts/train_async.py`` in a fork of this process, which has imported everything: it is up in a second."""

    def __init__(self, main: Callable[[list[str]], int], arguments: list[str], log: Path) -> None:
        self.log = log
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(output, 1)
                os.dup2(output, 2)
                code = main(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """Exit code; negative: the signal that killed it."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


class SpawnedRun:
    """The script as a user starts it."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("a") as output:
            command = [sys.executable, str(SCRIPT), *arguments]
            self._process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """See :meth:`ForkedRun.poll`."""
        return self._process.poll()


def wait(run: ForkedRun | SpawnedRun, until: Callable[[], bool] = lambda: False) -> int | None:
    """Exit code, or None as soon as ``until`` holds."""
    deadline = time.monotonic() + LIMIT_S
    while (code := run.poll()) is None and not until():
        if time.monotonic() > deadline:
            kill(run.pid)
            raise RuntimeError(f"no end after {LIMIT_S:.0f} s:\n{run.log.read_text()[-3000:]}")
        time.sleep(0.002)
    return code


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def family(pid: int, pattern: str) -> list[int]:
    """Descendants of a process whose command line matches."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if re.search(pattern, " ".join(child.cmdline()) or child.name()):
                    found.append(child.pid)
    return found


def run_dir_of(runs_dir: Path) -> Path | None:
    """The one run's folder, once there is one."""
    return next(iter(sorted((runs_dir / "chaos").glob("*"))), None)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
