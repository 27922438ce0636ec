"""The one thing that the driver waits on: what ends a wait is an answer of an actor, a signal or the next deadline."""

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

_LONGEST_WAIT_S = 1e6  # threading refuses more


class Timers(Protocol):
    """What has to be looked at by a certain time, whoever is waited for."""

    def due_at(self) -> float:
        """Time of the clock ``time.monotonic``; infinity if nothing is timed."""
        ...

    def look(self, now: float) -> None:
        """Does what is due."""
        ...


class Call:
    """An answer that is waited for: ``future`` is None until it has come."""

    def __init__(self) -> None:
        self.future: Future[Any] | None = None

    def answered(self, future: Future[Any]) -> None:
        self.future = future

    @property
    def done(self) -> bool:
        return self.future is not None


class Inbox:
    """Answers are handled in the driver's own thread, while it waits for whatever it waits for.

    ``SimpleQueue.put`` is reentrant: Ray's threads, and a signal handler that interrupts a ``get``, may call it.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[Future[Any]], None], Future[Any]] | None] = queue.SimpleQueue()
        self.timers: Timers | None = None

    def watch(self, reference: Any, handle: Callable[[Future[Any]], None]) -> None:
        """Has ``handle`` called with the future of an object reference once it is done; from :meth:`wait` only."""
        reference.future().add_done_callback(lambda future: self._queue.put((handle, future)))

    def call(self, reference: Any) -> "Call":
        """Watches a reference whose answer is only to be looked at."""
        call = Call()
        self.watch(reference, call.answered)
        return call

    def wake(self) -> None:
        """Ends a :meth:`wait` whose condition has come to hold by something that is no answer."""
        self._queue.put(None)

    def wait(self, done: Callable[[], bool], until: float) -> bool:
        """Handles what comes until ``done`` holds (True) or the clock ``time.monotonic`` passes ``until`` (False)."""
        while True:
            self._handle_all()  # an answer that lies here came before a limit ran out that is looked at after it
            if done():
                return True
            now = time.monotonic()
            if now >= until:
                return False
            if self.timers is not None and self.timers.due_at() <= now:
                self.timers.look(now)
                continue
            nearest = until if self.timers is None else min(until, self.timers.due_at())
            try:
                self._handle(self._queue.get(timeout=min(nearest - now, _LONGEST_WAIT_S)))
            except queue.Empty:
                continue

    def _handle_all(self) -> None:
        try:
            while True:
                self._handle(self._queue.get_nowait())
        except queue.Empty:
            return

    def _handle(self, item: tuple[Callable[[Future[Any]], None], Future[Any]] | None) -> None:
        if item is not None:
            handle, future = item
            handle(future)
