"""Ctrl-C and SIGTERM: the first asks the run to end at its next safe moment, the second leaves at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

_TOLD = b"\nstopping at the next safe moment, with a checkpoint (again to leave at once)\n"


class Interrupts:
    """A context manager. Nothing is raised by the first signal: it would break whatever state was just changing."""

    def __init__(self) -> None:
        self._requested = False
        self._old: dict[int, object] = {}

    def requested(self) -> bool:
        """Whether a signal came."""
        return self._requested

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
