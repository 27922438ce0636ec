"""Random admissions, commits, refunds, takes, publications and resumes of the buffer against a model."""

import json

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from machines import CountedMachine, run_machine
from tensordict import LazyStackedTensorDict

from vapo_async import schema
from vapo_async.buffer import RolloutBuffer
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Ticket
from vapo_async.state import State


def make_group(ticket: Ticket, group_size: int, versions: list[int]) -> LazyStackedTensorDict:
    """Sample k has k tokens more; token ids tell ticket and sample."""
    prompt = Prompt(ticket.ticket_id, Problem(0, "", ""), "", (1, 2))
    trajectories = []
    for k in range(group_size):
        stamps = versions + versions[:1] * k
        tokens = [ticket.ticket_id * 10 + k] * len(stamps)
        response = Response(k, tokens, [-0.1 * k] * len(stamps), stamps, FinishReason.STOP)
        trajectories.append(schema.make_trajectory(prompt, ticket, response))
    return schema.stack_group(trajectories)


def assert_same_state(first: State, second: State) -> None:
    assert json.loads(json.dumps(first.data)) == json.loads(json.dumps(second.data))
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())


class BufferMachine(CountedMachine):
    """The model: alive tickets in order, which of them run, and what each committed group held."""

    @initialize(
        b=st.integers(1, 4),
        g=st.integers(1, 2),
        lead=st.integers(0, 3),
        slack=st.sampled_from([0, 0, 1, 2, 5]),
        extra=st.integers(-1, 8),
        max_running=st.sampled_from([None, 1, 3]),
    )
    def start(self, b: int, g: int, lead: int, slack: int, extra: int, max_running: int | None) -> None:
        self.b, self.g = b, g
        self.buffer = self.new_buffer(lead, slack, extra, max_running)
        self.most = self.places
        self.running: dict[int, Ticket] = {}
        self.ready: dict[int, LazyStackedTensorDict] = {}
        self.trained: set[int] = set()
        self.late = 0
        self.training = False

    def new_buffer(self, lead: int, slack: int, extra: int, max_running: int | None) -> RolloutBuffer:
        capacity = None if extra < 0 else self.b + extra
        self.settings = lead, slack, extra, max_running
        self.bound, self.max_running = lead + slack, max_running
        self.places = min((lead + 1) * self.b, capacity or 1000)
        return RolloutBuffer(self.b, self.g, lead + slack, lead, capacity=capacity, max_running=max_running)

    def finish(self, ticket_id: int, versions: list[int]) -> None:
        group = make_group(self.running.pop(ticket_id), self.g, versions)
        self.ready[ticket_id] = group.clone()
        self.buffer.commit(ticket_id, group)

    @rule(times=st.integers(1, 12))
    def admit(self, times: int) -> None:
        for _ in range(times):
            ticket = self.buffer.admit()
            if ticket is None:
                assert not self.buffer.can_admit
                break
            assert ticket.version == self.buffer.published
            self.running[ticket.ticket_id] = ticket
            assert self.max_running is None or len(self.running) <= self.max_running

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 255), later=st.lists(st.integers(0, 3), max_size=2))
    def commit(self, which: int, later: list[int]) -> None:
        ticket = self.running[sorted(self.running)[which % len(self.running)]]
        last = self.buffer.published
        self.finish(ticket.ticket_id, [ticket.version, *(min(ticket.version + n, last) for n in later)])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 255))
    def commit_some(self, which: int) -> None:
        for i, ticket_id in enumerate(sorted(self.running)):
            if which >> (i % 8) & 1:
                self.finish(ticket_id, [self.running[ticket_id].version])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 255), reason=st.sampled_from(["failed", "rejected"]))
    def refund(self, which: int, reason: str) -> None:
        ticket_id = sorted(self.running)[which % len(self.running)]
        del self.running[ticket_id]
        self.buffer.refund(ticket_id, reason)

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        alive = sorted({**self.running, **self.ready})
        waits_for, blocker, reason = self.buffer.straggler(), self.buffer.blocker(), self.buffer.why_waiting()
        batch = self.buffer.take()
        assert (batch is not None) == (reason == "nothing: a batch is ready")
        if batch is None:
            assert self.running or len(self.ready) < self.b, "deadlock: everything is finished"
            assert (waits_for is None) == (not self.running)
            assert waits_for is None or waits_for.ticket_id in self.running
            replaceable = len(self.ready) < self.b and (len(alive) > self.b or self.buffer.can_admit)
            assert blocker == (None if replaceable else waits_for)
            return
        assert waits_for is None and blocker is None
        self.training = True
        rows = batch.groups.unbind(0)
        ids = [int(row[schema.TICKET_ID]) for row in rows][:: self.g]
        assert ids == batch.tickets == sorted(self.ready)[: self.b], "the oldest finished, in order of admission"
        assert len(ids) == self.b and not self.trained & set(ids), "trained twice"
        if self.bound == 0:
            assert ids == alive[: self.b], "synchronous"
        assert batch.version == self.buffer.published
        for index, (ticket_id, age) in enumerate(zip(ids, batch.ages, strict=True)):
            want = self.ready.pop(ticket_id)
            got = rows[index * self.g : (index + 1) * self.g]
            assert age == batch.version - schema.oldest_version(want) <= self.bound
            for a, b in zip(got, want.unbind(0), strict=True):
                assert all(torch.equal(a[key], b[key]) for key in schema.TRAJECTORY_DTYPES)
        self.trained |= set(ids)

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        before = self.buffer.published
        assert self.buffer.publish() == before + 1
        self.training = False

    @precondition(lambda self: not self.training)
    @rule()
    def resume(self) -> None:
        old, saved = self.buffer, self.buffer.state_dict()
        self.buffer = self.new_buffer(*self.settings)
        assert self.buffer.load_state_dict(State(json.loads(json.dumps(saved.data)), saved.tensors)) == []
        assert_same_state(self.buffer.state_dict(), saved)
        assert_same_state(old.state_dict(), saved)
        for name in ("published", "outstanding", "ready", "committed", "refund_reasons", "can_admit"):
            assert getattr(self.buffer, name) == getattr(old, name)
        assert self.buffer.why_waiting() == old.why_waiting() and self.buffer.straggler() == old.straggler()

    @precondition(lambda self: not self.training)
    @rule(
        lead=st.integers(0, 3),
        slack=st.sampled_from([0, 1, 5]),
        extra=st.integers(-1, 8),
        max_running=st.sampled_from([None, 2]),
    )
    def resume_with_other_limits(self, lead: int, slack: int, extra: int, max_running: int | None) -> None:
        saved, bound = self.buffer.state_dict(), self.bound
        self.buffer = self.new_buffer(lead, slack, extra, max_running)
        gone = {ticket.ticket_id for ticket in self.buffer.load_state_dict(saved)}
        assert not gone or self.bound < bound
        assert gone <= self.running.keys() | self.ready.keys()
        self.running = {key: ticket for key, ticket in self.running.items() if key not in gone}
        self.ready = {key: group for key, group in self.ready.items() if key not in gone}
        self.late += len(gone)
        self.most = max(self.places, len(self.running) + len(self.ready))

    @invariant()
    def tickets_balance(self) -> None:
        if not hasattr(self, "buffer"):
            return
        counts, reasons = self.buffer.ticket_counts(), self.buffer.refund_reasons
        assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
        assert counts["refunded"] == sum(reasons.values())
        assert reasons.get("max_staleness was lowered", 0) == self.late
        assert counts["committed"] == len(self.trained) + len(self.ready)
        assert (self.buffer.outstanding, self.buffer.ready) == (len(self.running), len(self.ready))
        assert len(self.running) + len(self.ready) <= self.most

    @invariant()
    def nothing_stands_still(self) -> None:
        """With nothing running there is a batch to take, one to publish, or a ticket to give."""
        if hasattr(self, "buffer") and not self.running and not self.training and len(self.ready) < self.b:
            assert self.buffer.can_admit

    @invariant()
    def serving_in_order_is_feasible(self) -> None:
        if not hasattr(self, "buffer"):
            return
        version = self.buffer.published + self.training
        for position, ticket in enumerate(self.buffer.unserved()):
            assert version + position // self.b - ticket.version <= self.bound


def test_buffer_machine() -> None:
    run_machine(BufferMachine, 110, 15_000)


@pytest.mark.slow
def test_buffer_machine_long() -> None:
    run_machine(BufferMachine, 1_000, 140_000)
