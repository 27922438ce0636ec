"""Ctrl-C and SIGTERM: the first asks the run to end at its next safe moment, the second leaves at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Protocol, Self

_TOLD = b"\nstopping at the next safe moment, with a checkpoint (again to leave at once)\n"


class Stop(Protocol):
    """Whether a wait is to be given up."""

    def __call__(self) -> bool: ...

    def on_request(self, wake: Callable[[], None]) -> None:
        """Has ``wake`` called once when it is asked for: possibly from a signal handler, so it must be reentrant."""
        ...


class Interrupts:
    """A context manager and a :class:`Stop`. Nothing is raised by the first signal: it would break a state change."""

    def __init__(self) -> None:
        self._requested = False
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
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        os.write(2, _TOLD)  # the only kind of output that is safe at any moment
        for wake in self._wake:
            wake()


class _Now:
    """See :data:`NOW`."""

    def __call__(self) -> bool:
        return True

    def on_request(self, wake: Callable[[], None]) -> None:
        wake()


NOW: Stop = _Now()
"""A wait that looks once and does not wait."""
