"""Watches the stages of which there is one each: notices at once when one dies, and counts what Ray starts again."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError

from vapo_async.launcher.ray_calls import reason
from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.stages import StageDiedError


class Services:
    """Flow and learner have a state, so that their death ends the run. Verifier and evaluator have none: Ray starts
    them again and repeats what they were asked, for every caller.

    Args:
        inbox: what the driver waits on.
        max_restarts: of each stage without a state; Ray's own limit is the same.
        fail: told once the run cannot go on.
        note: told what is worth a line.
        logs: where a dead process may have left its reason.
    """

    def __init__(
        self,
        inbox: Inbox,
        max_restarts: int,
        fail: Callable[[BaseException], None],
        note: Callable[[str], None],
        logs: str,
    ) -> None:
        self._inbox, self._max_restarts, self._fail, self._note = inbox, max_restarts, fail, note
        self._logs = logs
        self.restarts: dict[str, int] = {}
        """By stage, of those that died."""
        self._away: set[str] = set()

    def watch(self, name: str, actor: Any, restartable: bool) -> None:
        """Until the run ends. A call that is not repeated fails with the process that it was for."""
        alive = actor.alive.options(max_task_retries=0).remote()
        self._inbox.watch(alive, partial(self._on_end, name, actor, restartable))

    def away(self, name: str) -> bool:
        """Whether the stage died and is not back yet."""
        return name in self._away

    def _on_end(self, name: str, actor: Any, restartable: bool, future: Future[Any]) -> None:
        error = future.exception()
        assert error is not None, f"the {name}'s alive() returned"
        self._on_death(name, actor, restartable, error)

    def _on_back(self, name: str, actor: Any, future: Future[Any]) -> None:
        """It may have taken long, where its node was lost and no other one has room."""
        self._away.discard(name)
        error = future.exception()
        if error is None:
            self.watch(name, actor, restartable=True)
        else:
            self._on_death(name, actor, True, error)

    def _on_death(self, name: str, actor: Any, restartable: bool, error: BaseException) -> None:
        deaths = self.restarts.get(name, 0) + 1
        if restartable and not isinstance(error, ActorDiedError):
            self.restarts[name] = deaths
            self._note(f"the {name} is started again ({deaths} of {self._max_restarts} times): {reason(error)}")
            self._away.add(name)
            self._inbox.watch(actor.ping.remote(), partial(self._on_back, name, actor))
        elif restartable and deaths > 1:
            self._fail(
                StageDiedError(
                    f"the {name} died {deaths} times, the last time because {reason(error)}, and "
                    f"launcher.max_restarts={self._max_restarts} allows no more; see {self._logs}"
                )
            )
        else:
            self._fail(StageDiedError(f"the {name} cannot go on: {reason(error)}; see {self._logs}"))


class Counters:
    """Cumulative counters of a stage that begins at 0 again with every process of its own."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._now: dict[str, int] = {}

    def seen(self, now: dict[str, int]) -> None:
        """Counters never fall, so ones that did are of another process."""
        if any(now[key] < n for key, n in self._now.items()):
            self._before = self.total()
        self._now = now

    def total(self) -> dict[str, int]:
        """Over all processes, as far as they were seen."""
        return {key: n + self._before.get(key, 0) for key, n in self._now.items()}
