"""A pool of worker processes that judge answers under time and memory limits.

Whatever an answer does to its worker costs that answer only: the worker is killed, another one takes over the rest. An
answer takes ``timeout_s`` at most, or, where its worker dies or is starved, twice that and a start of a worker.
Workers are fresh interpreters (no fork of a threaded parent), and end with their parent, even when it is killed.
"""

import math
import selectors
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from vapo_async.config import RunError
from vapo_async.verifier.jobs import MAX_ANSWER_CHARS, Job, Outcome, encode_job, needs_of, pack
from vapo_async.verifier.process import WorkerProcess

_MAX_BATCH = 64
_SPARE_AFTER = 0.25
"""Share of the time limit after which an answer is expected to cost its worker: another one starts to load."""
_MAX_FAILED_STARTS = 3
"""Workers in a row that end before they are ready; then something is wrong that no restart mends."""


class SandboxError(RunError):
    """No worker can be brought to judge answers: a broken installation or a memory limit that is too low."""


class Sandbox:
    """``workers`` processes, ``timeout_s`` seconds for one answer, ``memory_mb`` MiB of address space per process.

    Threads may share it; their calls take turns. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(self, workers: int, timeout_s: float, memory_mb: int) -> None:
        if workers < 1:
            raise ValueError(f"verifier.workers is {workers}, expected at least 1")
        if not timeout_s > 0:
            raise ValueError(f"verifier.timeout_s is {timeout_s}, expected more than 0 seconds")
        if memory_mb < 1:
            raise ValueError(f"verifier.memory_mb is {memory_mb}, expected at least 1 MiB (512 is a sensible minimum)")
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._lock = threading.Lock()
        self._closed = False
        self._failed_starts = 0
        self._needs: frozenset[str] = frozenset()  # what earlier calls needed: no worker is replaced to alternate
        self._spare: WorkerProcess | None = None
        self._workers: list[WorkerProcess] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
        except SandboxError:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the workers."""
        return tuple(worker.pid for worker in self._workers)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes in the order of ``jobs``.

        Raises :class:`SandboxError` if no worker can be started, ``TypeError`` for metadata that is not JSON data,
        ``RuntimeError`` after :meth:`close`. Nothing that stands in an answer raises.
        """
        call = _Call(jobs)
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            wanted = self._needs | {needs_of(job) for job in call.encoded.values()}
            try:
                self._loop(call, wanted)
                self._needs = wanted
            finally:  # after Ctrl-C or an error nothing may answer a later call with this call's verdicts
                stale = [i for i, w in enumerate(self._workers) if w.owed or not w.fits(self._needs)]
                for slot in stale:
                    self._workers[slot].kill()
                    self._workers[slot].owed.clear()
                with suppress(SandboxError):  # the next call replaces the dead
                    for slot in stale:
                        self._replace(slot)
        assert all(outcome is not None for outcome in call.outcomes), "every job has an outcome"
        return [outcome for outcome in call.outcomes if outcome is not None]

    def close(self) -> None:
        """Ends the workers; waits for a call in progress. Closing twice is fine."""
        with self._lock:
            self._closed = True
            for worker in [*self._workers, *filter(None, [self._spare])]:
                worker.kill()
            self._workers, self._spare = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _loop(self, call: "_Call", wanted: frozenset[str]) -> None:
        """Judges ``call`` by workers that have loaded ``wanted``."""
        while call.pending or any(worker.owed for worker in self._workers):
            for slot, worker in enumerate(self._workers):
                if call.pending and not worker.owed:
                    while not worker.alive or not worker.fits(wanted):  # a spare may not do either
                        worker = self._replace(slot)
                    size = min(_MAX_BATCH, math.ceil(len(call.pending) / (2 * len(self._workers))))
                    batch = [call.pending.popleft() for _ in range(size)]
                    worker.assign(call.frame(batch, wanted, self._timeout_s), batch, wanted, self._timeout_s)
            self._wait()
            if self._spare is None and time.monotonic() >= self._spare_at():
                self._spare = self._start()
                self._spare.assign(call.frame([], wanted, self._timeout_s), [], wanted, self._timeout_s)
                with suppress(BrokenPipeError):  # dead already, which is found out when it is needed
                    self._spare.send()
            for slot, worker in enumerate(self._workers):
                if worker.owed:
                    self._advance(slot, worker, call)

    def _wait(self) -> None:
        """Until a worker can be written to or read from, or the first deadline."""
        busy = [worker for worker in self._workers if worker.owed]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ)
                if worker.sending:
                    selector.register(worker.stdin, selectors.EVENT_WRITE)
            wake = min(worker.deadline for worker in busy)
            if self._spare is None:
                wake = min(wake, self._spare_at())
            selector.select(max(0.0, wake - time.monotonic()))

    def _spare_at(self) -> float:
        """When an answer has taken so long that a worker should stand by; infinity while none is being judged."""
        deadlines = [worker.deadline for worker in self._workers if worker.owed and worker.ready]
        return min(deadlines, default=math.inf) - (1 - _SPARE_AFTER) * self._timeout_s

    def _advance(self, slot: int, worker: WorkerProcess, call: "_Call") -> None:
        """Moves the bytes that can move, then looks at the worker's deadline."""
        try:
            if worker.sending:
                worker.send()
            replies = worker.receive()
        except (BrokenPipeError, ValueError):
            replies = None
        if replies is None:
            self._give_up(slot, "crashed", call)
            return
        for reply in replies:
            if not worker.ready and isinstance(reply.get("error"), str):
                raise SandboxError(f"a verifier worker cannot load what it needs: {reply['error']}; {self._way_out()}")
            if not worker.ready and reply.get("ready") is True:
                worker.begin()
                self._failed_starts = 0
            elif worker.ready and worker.owed and isinstance(reply.get("correct"), bool):
                forbidden = reply.get("forbidden") is True
                call.outcomes[worker.owed.popleft()] = (
                    Outcome(False, "forbidden") if forbidden else Outcome(reply["correct"] is True)
                )
            else:  # not our protocol: the answer took the worker over
                self._give_up(slot, "crashed", call)
                return
        if worker.owed and time.monotonic() >= worker.deadline:
            self._give_up(slot, "timeout", call)

    def _give_up(self, slot: int, note: str, call: "_Call") -> None:
        """Replaces a worker. The rest of its batch goes to the others.

        So does, once, the answer it was at if the worker died under it, or ran out of time with little of it on a
        processor: that may be somebody else's doing.
        """
        worker = self._workers[slot]
        owed = list(worker.owed)
        worker.owed.clear()
        if worker.ready:
            innocent = note == "crashed" or worker.starved
            if innocent and owed[0] not in call.retried:
                call.retried.add(owed[0])
            else:
                call.outcomes[owed.pop(0)] = Outcome(False, note)
        else:  # it never came to an answer
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._failed_starts = 0
                raise SandboxError(
                    f"{_MAX_FAILED_STARTS} verifier workers in a row ended before they were ready ({note}); "
                    f"their messages are on stderr; {self._way_out()}"
                )
        call.pending.extendleft(reversed(owed))
        self._replace(slot)

    def _replace(self, slot: int) -> WorkerProcess:
        self._workers[slot].kill()
        self._workers[slot] = self._spare or self._start()
        self._spare = None
        return self._workers[slot]

    def _start(self) -> WorkerProcess:
        try:
            return WorkerProcess(self._memory_mb)
        except OSError as error:
            raise SandboxError(
                f"no verifier worker can be started: {error}; lower verifier.workers or free memory and processes"
            ) from error

    def _way_out(self) -> str:
        return (
            f"check that math-verify and reasoning-gym import, or raise verifier.memory_mb (now {self._memory_mb} MiB)"
        )


class _Call:
    """The jobs of one call by index, and how far they are: ``retried`` are judged a second time."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.outcomes: list[Outcome | None] = [
            Outcome(False, "too long") if len(job.pred) > MAX_ANSWER_CHARS else None for job in jobs
        ]
        self.encoded = {i: encode_job(job) for i, job in enumerate(jobs) if self.outcomes[i] is None}
        pack({"jobs": list(self.encoded.values())})  # what JSON cannot say is refused before anything is sent
        self.pending = deque(self.encoded)
        self.retried: set[int] = set()

    def frame(self, batch: Sequence[int], needs: frozenset[str], timeout_s: float) -> bytes:
        """The batch as it goes to a worker."""
        jobs = [self.encoded[i] for i in batch]
        return pack({"timeout_s": timeout_s, "needs": sorted(needs), "jobs": jobs})
