"""What a group costs in the buffer, over groups passed through and groups held: it has to be the same for all.

    python benchmarks/buffer.py --json buffer.json     three minutes on one core
    python benchmarks/buffer.py --quick                seconds: does it run?

A group is 16 trajectories of 512 tokens by the schema, checked on commit as in a run. *Passed* sends N groups through a
buffer that holds 32: admit, commit, take, publish. *Held* fills a buffer with N groups and then goes on with N held:
each group taken makes place for a new one. Groups are built outside the clock, from shared token tensors with scalars
of their own. B = 16; one thread of torch. Times are the process's CPU time, medians over repetitions, per group.
*Operations* are those of a buffer that holds 1,000 groups; a take has 16 groups, a state goes through its two files.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from bench import announce, command_line, environment, parse, print_bounds
from tensordict import LazyStackedTensorDict, TensorDict

from vapo_async.buffer import Batch, RolloutBuffer
from vapo_async.schema import (
    GROUP_ID,
    POLICY_VERSION,
    TICKET_ID,
    FinishReason,
    Problem,
    Prompt,
    Response,
    Ticket,
    make_trajectory,
    stack_group,
)
from vapo_async.state import read_state, write_state

T = TypeVar("T")
B, G, PROMPT, TOKENS = 16, 16, 64, 512
FULL, QUICK = (100, 1_000, 10_000, 100_000), (32, 64)
HELD_FOR_OPERATIONS = 1_000
LEAST_RATE = 1_000.0
"""Demanded of every size: groups per second of commit and take together."""
MOST_GROWTH = 1.5
"""Demanded: the cost of a group at the largest size by that at the smallest."""
REPETITIONS = 5
TURNS, QUICK_TURNS = 64, 4
"""Batches over which a full buffer and the operations are measured."""


class Groups:
    """Makes groups that differ in ticket, prompt and version alone, and makes them again of those that were taken."""

    def __init__(self) -> None:
        prompt, new = Prompt(0, Problem(0, "", ""), "", tuple(range(PROMPT))), TOKENS - PROMPT
        response = Response(0, [1] * new, [-0.5] * new, [0] * new, FinishReason.STOP)
        self._entries = dict(make_trajectory(prompt, Ticket(0, 0), response).items())
        self._versions: dict[int, torch.Tensor] = {}
        self._out: dict[int, LazyStackedTensorDict] = {}  # by ticket
        self._free: list[LazyStackedTensorDict] = []

    def make(self, ticket: Ticket) -> LazyStackedTensorDict:
        """The group of a ticket."""
        if ticket.version not in self._versions:
            self._versions = {ticket.version: torch.full((TOKENS,), ticket.version, dtype=torch.int32)}
        own = {
            POLICY_VERSION: self._versions[ticket.version],
            TICKET_ID: torch.tensor(ticket.ticket_id),
            GROUP_ID: torch.tensor(ticket.ticket_id),
        }
        if self._free:
            group = self._free.pop()
            for trajectory in group.tensordicts:
                trajectory.update(own)
        else:
            group = stack_group([TensorDict({**self._entries, **own}) for _ in range(G)])
        self._out[ticket.ticket_id] = group
        return group

    def taken(self, batch: Batch) -> None:
        """Its groups may be used again."""
        self._free += [self._out.pop(ticket_id) for ticket_id in batch.tickets]


@dataclass
class Clock:
    """Seconds and groups by operation."""

    seconds: float = 0.0
    groups: int = 0

    def add(self, call: Callable[[], T], groups: int) -> T:
        """Runs it on the clock."""
        start = time.process_time()
        result = call()
        self.seconds += time.process_time() - start
        self.groups += groups
        return result

    @property
    def us(self) -> float:
        """Microseconds per group."""
        return 1e6 * self.seconds / self.groups


@dataclass(frozen=True)
class Row:
    """A line of the first table."""

    kind: str
    """passed or held"""
    groups: int
    commit_us: float
    take_us: float
    groups_per_s: float
    """Of commit and take together."""
    growth: float
    """Of the cost of a group, by that at the smallest size of the kind."""


def fill(buffer: RolloutBuffer, groups: Groups, commit: Clock) -> None:
    """Commits a group for every ticket that can be had."""
    while (ticket := buffer.admit()) is not None:
        commit.add(partial(buffer.commit, ticket.ticket_id, groups.make(ticket)), 1)


def turn(buffer: RolloutBuffer, groups: Groups, commit: Clock, take: Clock) -> None:
    """Fills, takes a batch, publishes."""
    fill(buffer, groups, commit)
    batch = take.add(buffer.take, B)
    assert batch is not None
    groups.taken(batch)
    buffer.publish()


def measure(kind: str, groups: int, steady: int) -> tuple[float, float]:
    """Microseconds per group of commit and take: the medians of what the repetitions came to.

    Args:
        kind: passed or held.
        groups: so many.
        steady: batches that go through a buffer that holds ``groups``.
    """
    maker = Groups()
    lead = 1 if kind == "passed" else -(-groups // B) - 1
    buffer = RolloutBuffer(B, G, max_staleness=lead + 1, lead=lead)
    if kind == "passed":
        turns = max(1, groups // B)
    else:
        turns = steady
        fill(buffer, maker, Clock())
        assert buffer.ready >= groups, f"{buffer.ready} groups are held"
    turn(buffer, maker, Clock(), Clock())
    found: list[tuple[float, float]] = []
    parts = max(1, min(REPETITIONS, turns))
    repeats = REPETITIONS if turns * B * REPETITIONS <= 5_000 else 1  # small sizes again, large ones in parts
    for _ in range(repeats):
        for part in range(parts):
            commit, take = Clock(), Clock()
            for _ in range(turns * (part + 1) // parts - turns * part // parts):
                turn(buffer, maker, commit, take)
            found.append((commit.us, take.us))
    return statistics.median(c for c, _ in found), statistics.median(t for _, t in found)


def rows_of(kind: str, sizes: tuple[int, ...], steady: int) -> list[Row]:
    """One row per size."""
    rows: list[Row] = []
    for groups in sizes:
        commit_us, take_us = measure(kind, groups, steady)
        cost = commit_us + take_us
        first = rows[0].commit_us + rows[0].take_us if rows else cost
        rows.append(Row(kind, groups, commit_us, take_us, 1e6 / cost, cost / first))
        print(f"{kind} {groups:,}: {cost:,.0f} µs per group", file=sys.stderr, flush=True)
    return rows


def operations(held: int, turns: int) -> dict[str, float]:
    """Operations per second on a buffer that holds ``held`` groups."""
    maker, lead = Groups(), 2 * (-(-held // B))
    buffer = RolloutBuffer(B, G, lead, lead)
    running = [buffer.admit() for _ in range(held)]
    for ticket in running:
        assert ticket is not None
        buffer.commit(ticket.ticket_id, maker.make(ticket))
    clocks = {name: Clock() for name in ("admit", "refund", "commit", "take", "publish", "state round trip")}
    for _ in range(turns):
        tickets = clocks["admit"].add(lambda: [buffer.admit() for _ in range(2 * B)], 2 * B)
        given = [ticket for ticket in tickets if ticket is not None]
        clocks["refund"].add(lambda: [buffer.refund(ticket.ticket_id, "failed") for ticket in given[:B]], B)  # noqa: B023
        for ticket in given[B:]:
            clocks["commit"].add(partial(buffer.commit, ticket.ticket_id, maker.make(ticket)), 1)
        clocks["take"].add(buffer.take, 1)
        clocks["publish"].add(buffer.publish, 1)
    with TemporaryDirectory() as folder:

        def round_trip() -> None:
            write_state(buffer.state_dict(), Path(folder), "buffer")
            RolloutBuffer(B, G, lead, lead).load_state_dict(read_state(Path(folder), "buffer"))

        clocks["state round trip"].add(round_trip, 1)
    return {name: clock.groups / clock.seconds for name, clock in clocks.items()}


def bounds(rows: list[Row]) -> list[tuple[str, bool]]:
    """What is demanded, and whether it holds."""
    found = []
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        slowest = min(of_kind, key=lambda row: row.groups_per_s)
        text = f"{kind}: {slowest.groups_per_s:,.0f} groups/s at {slowest.groups:,} groups, the slowest"
        found.append((f"{text} (demanded >= {LEAST_RATE:,.0f})", slowest.groups_per_s >= LEAST_RATE))
        grown, sizes = of_kind[-1].growth, f"{of_kind[0].groups:,} to {of_kind[-1].groups:,} groups"
        text = f"{kind}: {grown:.2f} times the cost of a group from {sizes} (demanded <= {MOST_GROWTH:g})"
        found.append((text, grown <= MOST_GROWTH))
    return found


def print_tables(rows: list[Row], rates: dict[str, float], held: int) -> None:
    """As text."""
    titles = ("commit µs", "take µs", "groups/s", "growth")
    print(f"\n{'per group':<22}" + "".join(f"{title:>12}" for title in titles))
    for row in rows:
        texts = (f"{row.commit_us:,.0f}", f"{row.take_us:,.0f}", f"{row.groups_per_s:,.0f}", f"{row.growth:.2f}")
        print(f"{f'{row.kind} {row.groups:,}':<22}" + "".join(f"{text:>12}" for text in texts))
    print(f"\n{f'with {held:,} held':<22}{'per second':>12}")
    for name, rate in rates.items():
        print(f"{name:<22}" + (f"{rate:>12,.0f}" if rate >= 10 else f"{rate:>12.2f}"))


def main(arguments: list[str]) -> int:
    """Runs it, prints the tables and whether each bound holds, writes rows. 1 if one does not hold."""
    parser = command_line(__doc__)
    options = parse(parser, arguments)
    torch.set_num_threads(1)
    before = environment()
    announce(before)
    sizes, held, turns = (QUICK, 2 * B, QUICK_TURNS) if options.quick else (FULL, HELD_FOR_OPERATIONS, TURNS)
    rows = rows_of("passed", sizes, turns) + rows_of("held", sizes, turns)
    rates = operations(held, turns)
    print_tables(rows, rates, held)
    found = [] if options.quick else bounds(rows)
    print()
    print_bounds(found)
    if options.json is not None:
        written = {
            "environment": before,
            "load_average_after": environment()["load_average"],
            "buffer": [asdict(row) for row in rows],
            "operations_per_s": rates,
            "bounds": [{"bound": text, "holds": holds} for text, holds in found],
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if all(holds for _, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
