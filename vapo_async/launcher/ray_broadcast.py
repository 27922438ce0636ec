"""Publications by broadcast: the learner sends to all engines at once, each of which joins between two of its steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from vapo_async.config import RayLauncherConfig, RunError
from vapo_async.launcher.ray_answers import Answers
from vapo_async.launcher.ray_inbox import Call, Inbox
from vapo_async.launcher.ray_supervisor import RolloutWorkers
from vapo_async.stages import StageDiedError, StageTimeoutError
from vapo_async.weights.broadcast import Broadcast, Group, Layout, fits, members


class Broadcasts:
    """The driver's side.

    Who generates with the version before takes part; the group is made anew whenever these are others than last time.
    Whoever comes later, or while it is under way, gets a copy of what was sent. A broadcast that fails because a worker
    died costs the others theirs too: they are replaced, as it is. One that does not end, as NCCL's after a death, ends
    the run: the learner's ranks are in the middle of it, and nothing else can be asked of them.

    Args:
        inbox: what the driver waits on.
        launcher: the limits.
        learner: the actors of its ranks.
        workers: the rollout workers.
        ranks_per_engine: processes of one engine.
        logs: where a dead process may have left its reason.
    """

    def __init__(
        self,
        inbox: Inbox,
        launcher: RayLauncherConfig,
        learner: Sequence[Any],
        workers: RolloutWorkers,
        ranks_per_engine: int,
        logs: str,
    ) -> None:
        self._inbox, self._launcher = inbox, launcher
        self._answers = Answers(inbox, launcher.stage_timeout_s, logs)
        self._learner, self._workers, self._ranks = learner, workers, ranks_per_engine
        self._group: Group | None = None
        self._layout: Layout | None = None
        self._hangs = False

    def publish(self, version: int) -> None:
        """Returns when the learner has sent its weights; :meth:`.RolloutWorkers.without` tells who has heard of them.

        Raises:
            StageTimeoutError: a worker did not take the version before, or the broadcast does not end.
            RunError: the broadcast failed, and no worker's death explains it.
        """
        self._wait(lambda: not self._workers.handing(), lambda: "the rollout workers to take the version before")
        owners = members(self._workers.up_to_date())
        anew = bool(owners) and not fits(self._group, owners)
        if anew:
            host, port = self._answers.get(self._learner[0].meeting_point.remote(), "the learner")
            self._group = Group(host, port, owners, self._ranks)
        if self._layout is None:
            self._layout = self._answers.get(self._learner[0].layout.remote(), "the learner")
        group = self._group if owners else None
        sent = [self._inbox.call(rank.broadcast.remote(version, group, anew)) for rank in self._learner]
        parts = {} if group is None else {o: Broadcast(group, o, self._layout) for o in owners}
        self._workers.hand(version, lambda: [rank.sent.remote(version) for rank in self._learner], parts)
        try:
            self._end(sent, version, owners)
        except (StageDiedError, StageTimeoutError):
            raise
        except RunError:
            self._group = None
            until = time.monotonic() + self._launcher.engine_timeout_s
            if not self._inbox.wait(lambda: not self._workers.all_live(owners), until):
                raise

    def check(self) -> None:
        """To be asked before a checkpoint of the learner.

        Raises:
            StageTimeoutError: its ranks are in a broadcast that hangs.
        """
        if self._hangs:
            raise StageTimeoutError("the learner hangs in a broadcast and cannot be saved")

    def _end(self, sent: list[Call], version: int, owners: tuple[str, ...]) -> None:
        """Waits until no rank is in the broadcast: what they are asked next they do together.

        Raises:
            StageTimeoutError: it does not end.
            StageDiedError: a rank's process died.
            RunError: it failed, and has ended.
        """
        # An engine ends a step, then takes the weights. One that needs longer for either has been ended by then.
        limit = 2 * self._launcher.engine_timeout_s
        try:
            try:
                self._answers.results(sent, "the learner", limit)
            except (StageDiedError, StageTimeoutError):
                raise
            except RunError:  # of the rank that sends
                self._answers.results(sent[1:], "the learner", limit)
                raise
        except StageTimeoutError as error:
            self._hangs = True
            lost = [owner for owner in owners if not self._workers.all_live([owner])]
            why = f"it lost {', '.join(lost)}" if lost else "raise that if the weights take so long"
            raise StageTimeoutError(
                f"the learner's broadcast of version {version} to {', '.join(owners) or 'nobody'} did not end within "
                f"{limit:g} s, twice launcher.engine_timeout_s: {why}; resume=auto goes on from the last checkpoint"
            ) from error

    def _wait(self, done: Callable[[], bool], whom: Callable[[], str]) -> None:
        if not self._answers.wait(done):
            limit = self._launcher.stage_timeout_s
            raise StageTimeoutError(f"the learner waited {limit:.0f} s for {whom()}")
