"""The process that judges answers: ``python -m vapo_async.verifier.worker MEMORY_MB``, started by the sandbox.

It reads batches from stdin and writes verdicts to stdout (see :mod:`.jobs`). It limits its memory and its CPU time per
answer, loads what the first batch needs, seals itself (:mod:`.seal`) before it looks at an answer, and ends with its
parent. Imports no torch.
"""

import math
import os
import resource
import select
import sys
import threading
import time
from typing import Any

from vapo_async.verifier.jobs import needs_of, pack, unpack
from vapo_async.verifier.loading import Judge, load
from vapo_async.verifier.seal import Forbidden, Seal, limit

_MAX_BATCH_BYTES = 1 << 28
_CPU_GRACE_S = 1
_ORPHAN_CHECK_MS = 1000


class Worker:
    """Judges batches; ``sink`` is the descriptor that the verdicts go to."""

    def __init__(self, sink: int) -> None:
        self._sink = sink
        self._judges: dict[str, Judge] = {}
        self._seal: Seal | None = None

    def serve(self, batch: dict[str, Any]) -> None:
        """Answers one batch. The first one decides what this worker can judge."""
        if self._seal is None:
            try:
                self._judges = load(batch["needs"])
            except Exception as error:  # noqa: BLE001 - reported to the parent, which raises it
                self._send({"error": f"{type(error).__name__}: {error}"})
                return
            self._seal = Seal()
        self._send({"ready": True})
        for job in batch["jobs"]:
            # The parent kills after timeout_s; this is for a busy worker whose parent is gone.
            allowance = math.ceil(time.process_time() + batch["timeout_s"]) + _CPU_GRACE_S
            limit(resource.RLIMIT_CPU, allowance, resource.getrlimit(resource.RLIMIT_CPU)[1])
            self._send(self._verdict(job, self._seal))

    def _verdict(self, job: dict[str, Any], seal: Seal) -> dict[str, object]:
        seal.reset()
        try:
            correct = self._judges[needs_of(job)](job)
        except (Exception, Forbidden):  # noqa: BLE001 - judges raise anything on a model's text
            correct = False
        if seal.broken:  # whether or not the exception came through
            return {"correct": False, "forbidden": True}
        return {"correct": correct}

    def _send(self, message: dict[str, object]) -> None:
        frame = memoryview(pack(message))
        while frame:
            frame = frame[os.write(self._sink, frame) :]


def main(memory_mb: int) -> None:
    """Serves batches until stdin ends."""
    source, sink = os.dup(0), os.dup(1)
    threading.Thread(target=_exit_with_parent, args=(source, os.getppid()), daemon=True).start()
    limit(resource.RLIMIT_AS, memory_mb << 20)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # whatever a scorer prints must not reach the frames
        os.dup2(null, fd)
    sys.setrecursionlimit(2000)

    worker = Worker(sink)
    buffer = bytearray()
    while data := os.read(source, 1 << 20):
        buffer += data
        for batch in unpack(buffer, _MAX_BATCH_BYTES):
            worker.serve(batch)
    os._exit(0)  # a sealed interpreter cannot tidy up


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
