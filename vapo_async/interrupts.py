"""Ctrl-C and SIGTERM: the first asks the run to end at its next safe moment, the second leaves at once."""

import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol, Self

_TOLD = b"\nstopping at the next safe moment, with a checkpoint (again to leave at once)\n"
_GRACE_S = 0.5
"""How long the second signal's exception may take to come; twice, then the process ends without it."""
EXIT_CODE = 130


class Stop(Protocol):
    """Whether a wait is to be given up."""

    def __call__(self) -> bool: ...

    def on_request(self, wake: Callable[[], None]) -> None:
        """Has ``wake`` called once when it is asked for: possibly from a signal handler, so it must be reentrant."""
        ...


class Interrupts:
    """A context manager and a :class:`Stop`. Nothing is raised by the first signal: it would break a state change.

    Python runs a signal's handler between two instructions of the main thread, so one long call into torch keeps it
    waiting and makes two signals one. A thread sees each at once: it tells the first, and sees to it that the second
    ends the process.
    """

    def __init__(self) -> None:
        self._requested = False
        self._raised = threading.Event()
        self._old: dict[int, object] = {}
        self._wake: list[Callable[[], None]] = []

    def __call__(self) -> bool:
        """Whether a signal came."""
        return self._requested

    def on_request(self, wake: Callable[[], None]) -> None:
        """See :class:`Stop`. After a signal ``wake`` is called at once; asking twice changes nothing."""
        if wake not in self._wake:
            self._wake.append(wake)
        if self._requested:
            wake()

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        self._watcher = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._write)  # ends the thread
        self._watcher.join()
        os.close(self._read)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            self._raised.set()
            raise KeyboardInterrupt
        self._requested = True
        for wake in self._wake:
            wake()

    def _watch(self) -> None:
        """Reads the signals' numbers as the system delivers them."""
        count = 0
        while count < 2:
            numbers = os.read(self._read, 1)
            if not numbers:
                return
            if numbers[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            count += 1
            if count == 1:
                os.write(2, _TOLD)
        if not self._ended(_GRACE_S):
            os.kill(os.getpid(), signal.SIGINT)  # the two were one to the handler
            if not self._ended(_GRACE_S):
                os._exit(EXIT_CODE)  # one call that does not end; what is half-written never counts

    def _ended(self, within_s: float) -> bool:
        """Whether the exception was raised, or the context was left."""
        return self._raised.wait(within_s) or self._left()

    def _left(self) -> bool:
        """The pipe's other end is closed."""
        while select.select([self._read], [], [], 0)[0]:
            if not os.read(self._read, 64):
                return True
        return False


class _Now:
    """See :data:`NOW`."""

    def __call__(self) -> bool:
        return True

    def on_request(self, wake: Callable[[], None]) -> None:
        wake()


NOW: Stop = _Now()
"""A wait that looks once and does not wait."""
