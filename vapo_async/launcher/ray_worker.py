"""One incarnation of a rollout worker, as the driver knows it."""

import time
from dataclasses import dataclass, field
from typing import Any

from vapo_async.config import RayLauncherConfig
from vapo_async.launcher.ray_flow import Progress


@dataclass(eq=False)
class Worker:
    """Tickets know it by ``owner``. Times are of the clock ``time.monotonic``."""

    index: int
    owner: str
    actor: Any
    heard_at: float = field(default_factory=time.monotonic)
    """When it gave its last sign of life, or was started."""
    up: bool = False
    running: bool = False
    lost: bool = False
    asked_at: float | None = None
    """Since when a sign of life is asked for; None: it is not."""
    version: int = -1
    """Of the weights that it has, confirmed."""
    handing: bool = False
    progress: Progress = field(default_factory=Progress)

    @property
    def watched(self) -> bool:
        """Whether it owes signs of life: it starts, takes weights or generates."""
        return not self.lost and (self.running or self.handing or not self.up)

    def due_at(self, launcher: RayLauncherConfig) -> float:
        """When it has been silent for so long that it has to be looked at."""
        if not self.up:
            return self.heard_at + launcher.start_timeout_s
        return (self.heard_at if self.asked_at is None else self.asked_at) + launcher.engine_timeout_s

    def heard(self) -> None:
        """It has just given a sign of life."""
        self.heard_at, self.asked_at = time.monotonic(), None

    def why_silent(self, launcher: RayLauncherConfig, now: float) -> str | None:
        """What is told of one that is due: why it counts as dead, None if it has not been asked yet."""
        if not self.up:
            return f"it did not start within {launcher.start_timeout_s:g} s"
        if self.asked_at is None:
            return None
        limit = launcher.engine_timeout_s
        return f"it gave no sign of life for {now - self.heard_at:.0f} s (launcher.engine_timeout_s={limit:g})"
