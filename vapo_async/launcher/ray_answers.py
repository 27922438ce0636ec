"""What the driver does with questions to actors: asks, waits within a limit, and tells who did not answer."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from vapo_async.launcher.ray_calls import answer
from vapo_async.launcher.ray_inbox import Call, Inbox
from vapo_async.stages import StageTimeoutError


class Answers:
    """Answers of actors, each within a limit.

    Args:
        inbox: what the driver waits on.
        limit_s: of one wait, where none is given.
        logs: where a dead process may have left its reason.
    """

    def __init__(self, inbox: Inbox, limit_s: float, logs: str) -> None:
        self._inbox, self._limit_s, self._logs = inbox, limit_s, logs

    def wait(self, done: Callable[[], bool], limit_s: float | None = None) -> bool:
        """Whether it came to hold within the limit."""
        limit = self._limit_s if limit_s is None else limit_s
        return self._inbox.wait(done, time.monotonic() + limit)

    def get(self, reference: Any, whom: str, limit_s: float | None = None) -> Any:
        """The answer, or an error that names whom was waited for; see :func:`.ray_calls.answer`."""
        return self.result(self._inbox.call(reference), whom, limit_s)

    def all(self, references: Sequence[Any], whom: str, limit_s: float | None = None) -> list[Any]:
        """All answers, or the first error: who waits for one that died would wait for ever."""
        return self.results([self._inbox.call(reference) for reference in references], whom, limit_s)

    def result(self, call: Call, whom: str, limit_s: float | None = None) -> Any:
        """Likewise of something that has been asked."""
        return self.results([call], whom, limit_s)[0]

    def results(self, calls: Sequence[Call], whom: str, limit_s: float | None = None) -> list[Any]:
        """Likewise of several."""
        limit = self._limit_s if limit_s is None else limit_s

        def failed() -> list[Call]:
            return [call for call in calls if call.future is not None and call.future.exception() is not None]

        if not self.wait(lambda: all(call.done for call in calls) or bool(failed()), limit):
            raise StageTimeoutError(f"the run waited {limit:.0f} s for {whom} and gave up")
        found = []
        for call in failed() or calls:
            assert call.future is not None
            found.append(answer(call.future, whom, self._logs))
        return found
