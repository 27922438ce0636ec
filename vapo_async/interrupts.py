"""Ctrl-C and SIGTERM: the first ends the run at the next safe moment, the second leaves at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self


class Interrupted(Exception):  # noqa: N818
    """Raised inside :meth:`Interrupts.raising` by the first signal."""


class Interrupts:
    """A context manager; outside :meth:`raising` the first signal only sets :attr:`requested`."""

    def __init__(self) -> None:
        self.requested = False
        self._raise = False
        self._old: dict[int, object] = {}

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A wait that the first signal may break."""
        if self.requested:
            raise Interrupted
        self._raise = True
        try:
            yield
        finally:
            self._raise = False

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._raise:
            self._raise = False
            raise Interrupted
