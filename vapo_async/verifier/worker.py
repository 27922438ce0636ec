"""The process that judges answers: ``python -m vapo_async.verifier.worker MEMORY_MB``, started by the sandbox.

It reads batches from stdin and writes verdicts to stdout (see :mod:`.jobs`). It limits itself (address space, CPU time
per answer, no core dumps, no file writes, few descriptors, no children) and ends with its parent. Imports no torch.
"""

import math
import os
import resource
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from vapo_async.verifier.jobs import pack, unpack

_MAX_BATCH_BYTES = 1 << 28
_MAX_OPEN_FILES = 64
_CPU_GRACE_S = 1
_ORPHAN_CHECK_MS = 1000


def main(memory_mb: int) -> None:
    """Serves batches until stdin ends."""
    source, sink = os.dup(0), os.dup(1)
    threading.Thread(target=_exit_with_parent, args=(source, os.getppid()), daemon=True).start()
    _limit(resource.RLIMIT_AS, memory_mb << 20)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    _limit(resource.RLIMIT_NPROC, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # whatever a scorer prints must not reach the frames
        os.dup2(null, fd)
    sys.setrecursionlimit(2000)

    scorers: dict[str, Callable[..., Any]] = {}
    buffer = bytearray()
    while data := os.read(source, 1 << 20):
        buffer += data
        for batch in unpack(buffer, _MAX_BATCH_BYTES):
            _serve(batch, scorers, sink)


def _serve(batch: dict[str, Any], scorers: dict[str, Callable[..., Any]], sink: int) -> None:
    try:
        for job in batch["jobs"]:
            _load(job, scorers)
    except Exception as error:  # noqa: BLE001 - reported to the parent, which raises it
        _send(sink, {"error": f"{type(error).__name__}: {error}"})
        return
    _send(sink, {"ready": True})
    for job in batch["jobs"]:
        # The parent kills after timeout_s; this is for a busy worker whose parent is gone.
        allowance = math.ceil(time.process_time() + batch["timeout_s"]) + _CPU_GRACE_S
        _limit(resource.RLIMIT_CPU, allowance, resource.getrlimit(resource.RLIMIT_CPU)[1])
        _send(sink, {"correct": _judge(job, scorers)})


def _load(job: dict[str, Any], scorers: dict[str, Callable[..., Any]]) -> None:
    """Imports what the job needs, outside the time limit of any answer."""
    if job["kind"] == "equivalence":
        if "equivalence" not in scorers:
            import math_verify  # noqa: F401 - imported for later

            from vapo_async.verifier.math import equivalent

            equivalent(r"\frac{x}{2}", r"x \cdot \frac12")  # builds the grammar's tables
            scorers["equivalence"] = equivalent
    elif job["dataset"] not in scorers:
        import reasoning_gym

        scorers[job["dataset"]] = reasoning_gym.get_score_answer_fn(job["dataset"])


def _judge(job: dict[str, Any], scorers: dict[str, Callable[..., Any]]) -> bool:
    if job["kind"] == "equivalence":
        return bool(scorers["equivalence"](job["gold"], job["pred"]))
    entry = {"question": "", "answer": job["answer"], "metadata": job["metadata"]}
    try:
        # The base scorer pays partial credit for an answer that contains the right one.
        return bool(scorers[job["dataset"]](job["pred"], entry) == 1.0)
    except Exception:  # noqa: BLE001 - scorers raise anything on a model's text
        return False


def _send(sink: int, message: dict[str, object]) -> None:
    frame = memoryview(pack(message))
    while frame:
        frame = frame[os.write(sink, frame) :]


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    """Lowers a limit of this process; ``hard`` None sets both. Never above the hard limit that is in force."""
    ceiling = resource.getrlimit(which)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft = min(soft, ceiling)
        hard = ceiling if hard == resource.RLIM_INFINITY else min(hard, ceiling)
    resource.setrlimit(which, (soft, hard))


def _exit_with_parent(source: int, parent: int) -> None:
    """Ends the process once the pipe's other end is closed or the parent is gone, even in the middle of an answer.

    Code that keeps the interpreter's lock can hold this up; then the CPU limit ends the process.
    """
    poll = select.poll()
    poll.register(source, 0)  # hang-up is always reported
    while not poll.poll(_ORPHAN_CHECK_MS) and os.getppid() == parent:
        pass
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
