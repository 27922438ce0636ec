"""The flow in an actor of its own: the one place where learner and rollout workers wait for each other."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from tensordict import TensorDictBase

from vapo_async.buffer import Batch
from vapo_async.build import BaseModel, build_flow
from vapo_async.config import Config
from vapo_async.flow import Assignment, FlowCounters
from vapo_async.schema import Response
from vapo_async.state import read_state, write_state

FLOW = "flow"
"""Name of the flow's files in a checkpoint."""


@dataclass(frozen=True)
class Progress:
    """What one rollout worker has done so far."""

    generated_tokens: int = 0
    generation_wait_s: float = 0.0
    """Seconds without anything to generate."""
    verdict_wait_s: float = 0.0
    """Seconds that finished groups waited for their verdicts, summed over groups."""


class FlowActor:
    """The flow behind a condition: one event loop, so its methods never interleave inside a state change."""

    def __init__(self, config: Config, base: BaseModel) -> None:
        self._flow = build_flow(config, base)
        self._changed = asyncio.Condition()
        self._lost: set[str] = set()
        self._cancelled: dict[str, list[int]] = {}  # by owner, until it asks
        self._progress: dict[str, Progress] = {}

    async def ping(self) -> None:
        """Returns once the actor is up."""

    async def alive(self) -> None:
        """Does not return: its caller learns of the actor's death at once."""
        await asyncio.Event().wait()

    async def admit(self, most: int, owner: str) -> list[Assignment]:
        """Waits until at least one ticket can be given; [] once the flow is closed or the owner is lost."""
        async with self._changed:
            while not (assignments := self._flow.admit(most, owner)) and not self._over_for(owner):
                await self._changed.wait()
            self._changed.notify_all()  # with the last place taken, somebody may be a straggler
            return assignments

    async def commit(self, ticket_id: int, group: TensorDictBase, owner: str, progress: Progress) -> None:
        """Wakes who waits for a batch and, as the group may be refused, who waits for a ticket."""
        async with self._changed:
            self._progress[owner] = progress
            self._flow.commit(ticket_id, group)
            self._changed.notify_all()

    async def lose(self, owner: str) -> list[int]:
        """Ends all tickets of a rollout worker that is gone, and gives it no more. Returns their ids."""
        async with self._changed:
            self._lost.add(owner)
            lost = self._flow.lose(owner)
            self._changed.notify_all()
            return lost

    async def cancellations(self, owner: str) -> list[int] | None:
        """Waits until tickets of the owner are to be cancelled; None once there will be none."""
        async with self._changed:
            while not (cancelled := self._cancelled.pop(owner, [])):
                if self._over_for(owner):
                    return None
                await self._changed.wait()
            return cancelled

    async def dropped(self, ticket_id: int, lengths: Sequence[int]) -> None:
        """Tokens of each response of a group that was cancelled."""
        self._flow.dropped(ticket_id, lengths)

    async def take(self) -> tuple[Any, list[int], int, list[int], list[int]] | None:
        """Waits for a batch: a reference to its trajectories, then the rest of a ``TakenBatch``. None once closed.

        Meanwhile stragglers are dropped, where that is asked for. Raises ``RunError`` when dynamic sampling runs out of
        patience.
        """
        async with self._changed:
            batch: Batch | None
            while (batch := self._flow.take()) is None:
                if self._flow.closed:
                    return None
                if (overdue := self._flow.drop_overdue(time.monotonic())) is not None:
                    ticket_id, owner = overdue
                    self._cancelled.setdefault(owner, []).append(ticket_id)
                    self._changed.notify_all()
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._flow.seconds_until_overdue(time.monotonic())):
                        await self._changed.wait()
            handle = ray.put(list(batch.groups.unbind(0)))
            return handle, batch.ages, batch.version, batch.tickets, batch.group_ids

    async def publish(self) -> int:
        async with self._changed:
            version = self._flow.publish()
            self._changed.notify_all()
            return version

    async def close(self) -> None:
        async with self._changed:
            self._flow.close()
            self._changed.notify_all()

    async def why_waiting(self) -> str:
        return self._flow.why_waiting()

    async def counters(self) -> tuple[FlowCounters, dict[str, Progress]]:
        """And what each rollout worker, dead ones included, had done when it committed last."""
        return self._flow.counters(), dict(self._progress)

    async def save(self, folder: Path, carried: Mapping[int, Sequence[Response]]) -> None:
        """``carried``: responses so far, by ticket. Asked for before: a ticket that ended since then has its group."""
        write_state(self._flow.state_dict(carried), folder, FLOW)

    async def load(self, folder: Path) -> int:
        """Returns the restored version."""
        self._flow.load_state_dict(read_state(folder, FLOW))
        return self._flow.published

    def _over_for(self, owner: str) -> bool:
        return self._flow.closed or owner in self._lost
