"""One worker process as its parent sees it: spawn, non-blocking pipes, deadlines, kill. Decides nothing."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vapo_async.verifier.jobs import unpack

START_TIMEOUT_S = 60.0
"""Limit for a worker to import what a batch needs."""
_MAX_REPLY_BYTES = 1 << 16
# A small environment: a worker that runs scorers on a model's text has no use for the parent's credentials.
_PASSED_ON = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LANG"),
    *("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"),
)


def _environment() -> dict[str, str]:
    env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not os.access(env.get("HOME", ""), os.W_OK):
        # reasoning-gym imports matplotlib, which insists on a writable folder (the worker has no use for it).
        env.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
    return env


class WorkerProcess:
    """A running worker, and what it owes: ``owed`` holds the indices of the jobs sent and not yet answered."""

    def __init__(self, memory_mb: int) -> None:
        """``OSError`` where the machine cannot start a process now."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-m", "vapo_async.verifier.worker", str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            cwd="/",
            start_new_session=True,  # Ctrl-C is the parent's business, and its children die with it
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdin = self._process.stdin.fileno()
        self.stdout = self._process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.owed: deque[int] = deque()
        self.deadline = 0.0
        self._timeout_s = 0.0
        self._cpu_mark: float | None = None  # processor time when the current answer was begun
        self._unready = 0  # batches sent and not yet begun
        self._loaded: frozenset[str] = frozenset()
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def ready(self) -> bool:
        """It has loaded what it needs and is at the batch that it owes."""
        return self._unready == 0

    def begin(self) -> None:
        """It says that it is ready for a batch. ``ValueError`` if it has none."""
        if self._unready == 0:
            raise ValueError("a worker is ready for nothing")
        self._unready -= 1

    @property
    def sending(self) -> bool:
        """Part of a batch has not gone into the pipe yet."""
        return len(self._outgoing) > 0

    def fits(self, needs: frozenset[str]) -> bool:
        """Whether it has loaded ``needs`` or still can: a worker loads once."""
        return not self._loaded or needs <= self._loaded

    def assign(self, frame: bytes, indices: Iterable[int], needs: frozenset[str], timeout_s: float) -> None:
        """Hands over a batch. Loading has a limit of its own; each answer then has ``timeout_s``."""
        assert not self.owed and self.fits(needs), "a worker takes one batch at a time, and loads once"
        self.owed.extend(indices)
        self._timeout_s = timeout_s
        limit = timeout_s if self._loaded and self.ready else max(START_TIMEOUT_S, timeout_s)
        self._unready += 1
        self._loaded = self._loaded or needs
        self.deadline = time.monotonic() + limit
        self._outgoing = memoryview(bytes(self._outgoing) + frame)

    def send(self) -> None:
        """Writes what the pipe takes now. ``BrokenPipeError`` if the worker is gone."""
        with suppress(BlockingIOError):
            self._outgoing = self._outgoing[os.write(self.stdin, self._outgoing) :]

    def receive(self) -> list[dict[str, object]] | None:
        """The complete replies that have come, or None at the end of the stream. ``ValueError`` for garbage."""
        try:
            data = os.read(self.stdout, 1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return None
        self._incoming += data
        replies = list(unpack(self._incoming, _MAX_REPLY_BYTES))
        if replies:
            self.deadline = time.monotonic() + self._timeout_s
            self._cpu_mark = self._cpu_s()
        return replies

    @property
    def starved(self) -> bool:
        """It got less than half of the time limit in processor time since its last reply. False where unknown."""
        now = self._cpu_s()
        return now is not None and self._cpu_mark is not None and now - self._cpu_mark < self._timeout_s / 2

    def _cpu_s(self) -> float | None:
        """Processor seconds of its life so far, None where the system does not tell."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
            # After the name in brackets, which may hold anything, fields 3 on; 14 and 15 are utime and stime.
            utime, stime = text.rpartition(")")[2].split()[11:13]
            return (int(utime) + int(stime)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None

    def kill(self) -> None:
        """Ends the process and what it may have started, at once, and reaps it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
