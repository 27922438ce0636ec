"""Publications by broadcast: the learner sends to all engines at once, each of which joins between two of its steps."""

import time
from collections.abc import Callable
from typing import Any

from vapo_async.config import RayLauncherConfig, RunError
from vapo_async.launcher.ray_calls import answer
from vapo_async.launcher.ray_inbox import Inbox
from vapo_async.launcher.ray_supervisor import RolloutWorkers
from vapo_async.stages import StageDiedError, StageTimeoutError
from vapo_async.weights.broadcast import Broadcast, Group, Layout, fits, members


class Broadcasts:
    """The driver's side.

    Who generates with the version before takes part; the group is made anew whenever these are others than last time.
    Whoever comes later gets a copy of what was sent. A broadcast that fails because a worker died costs the others
    theirs too: they are replaced, as it is.

    Args:
        inbox: what the driver waits on.
        launcher: the limits.
        learner: its actor.
        workers: the rollout workers.
        ranks_per_engine: processes of one engine.
        logs: where a dead process may have left its reason.
    """

    def __init__(
        self,
        inbox: Inbox,
        launcher: RayLauncherConfig,
        learner: Any,
        workers: RolloutWorkers,
        ranks_per_engine: int,
        logs: str,
    ) -> None:
        self._inbox, self._launcher, self._logs = inbox, launcher, logs
        self._learner, self._workers, self._ranks = learner, workers, ranks_per_engine
        self._group: Group | None = None
        self._layout: Layout | None = None

    def publish(self, version: int) -> None:
        """Returns when the learner has sent its weights; :meth:`.RolloutWorkers.without` tells who has heard of them.

        Raises:
            StageTimeoutError: somebody did not take part.
            RunError: the broadcast failed, and no worker's death explains it.
        """
        self._wait(lambda: not self._workers.handing(), lambda: "the rollout workers to take the version before")
        owners = members(self._workers.up_to_date())
        anew = bool(owners) and not fits(self._group, owners)
        if anew:
            host, port = self._answer(self._learner.meeting_point.remote())
            self._group = Group(host, port, owners, self._ranks)
        if self._layout is None:
            self._layout = self._answer(self._learner.layout.remote())
        sent = self._learner.broadcast.remote(self._group if owners else None, anew)
        parts = {} if self._group is None else {o: Broadcast(self._group, o, self._layout) for o in owners}
        self._workers.hand(version, lambda: self._learner.sent.remote(), parts)
        try:
            self._answer(sent, f"{', '.join(owners)} to join the broadcast of version {version}")
        except StageDiedError:
            raise
        except RunError:
            self._group = None
            until = time.monotonic() + self._launcher.engine_timeout_s
            if not self._inbox.wait(lambda: not self._workers.all_live(owners), until):
                raise

    def _answer(self, reference: Any, whom: str = "the learner") -> Any:
        call = self._inbox.call(reference)
        self._wait(lambda: call.done, lambda: whom)
        assert call.future is not None
        return answer(call.future, "the learner", self._logs)

    def _wait(self, done: Callable[[], bool], whom: Callable[[], str]) -> None:
        limit = self._launcher.stage_timeout_s
        if not self._inbox.wait(done, time.monotonic() + limit):
            raise StageTimeoutError(f"the learner waited {limit:.0f} s for {whom()}")
