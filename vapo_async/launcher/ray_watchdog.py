"""Ends a process whose work does not come back, with the stacks of its threads in the log."""

import faulthandler
import time

_STDERR = 2  # the file that Ray keeps; sys.stderr may be an object of its own


class Watchdog:
    """Armed by :meth:`alive`, it ends the process unless ``alive`` or :meth:`rest` is called within the limit.

    A thread of C does it, without the interpreter's lock: a call that never returns is ended too. Arming anew costs a
    thread (36 µs measured), so it is done at most once in a tenth of the limit or a second; the limit may run out that
    much earlier.

    Args:
        timeout_s: the limit.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._granularity_s = min(1.0, timeout_s / 10)
        self._armed_at: float | None = None

    def alive(self) -> None:
        """The work begins, or has come back and goes on."""
        now = time.monotonic()
        if self._armed_at is None or now - self._armed_at >= self._granularity_s:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=_STDERR)
            self._armed_at = now

    def rest(self) -> None:
        """There is no work."""
        if self._armed_at is not None:
            faulthandler.cancel_dump_traceback_later()
            self._armed_at = None
