"""``is_equivalent``: the safe form of :func:`.math.equivalent`, for callers without a sandbox of their own."""

import atexit
import os
import threading

from vapo_async.verifier.jobs import EquivalenceJob
from vapo_async.verifier.sandbox import Sandbox

TIMEOUT_S = 5.0
MEMORY_MB = 2048
_lock = threading.Lock()
_sandbox: Sandbox | None = None


def is_equivalent(gold: str, pred: str) -> bool:
    """Whether ``pred`` is mathematically the same answer as ``gold``.

    Judged in a process of its own, which the first call starts: text that hangs for 5 s, crashes or is longer than
    4,000 characters is not equivalent. Threads may call it; calls take turns.
    """
    global _sandbox
    with _lock:
        if _sandbox is None:
            _sandbox = Sandbox(workers=1, timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB)
        sandbox = _sandbox
    return sandbox.run([EquivalenceJob(gold, pred)])[0].correct


def _close() -> None:
    if _sandbox is not None:
        _sandbox.close()


def _forget() -> None:
    """A forked child must not talk to its parent's worker, nor end it: it starts its own."""
    global _sandbox, _lock
    _sandbox, _lock = None, threading.Lock()


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)
