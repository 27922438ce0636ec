"""Random admissions, commits, refunds, takes, publications and resumes at many S, L, B against a model."""

import json

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tensordict import LazyStackedTensorDict

from vapo_async import schema
from vapo_async.buffer import RolloutBuffer
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Ticket


class BufferMachine(RuleBasedStateMachine):
    """The model: alive tickets in order, which of them run, and what each committed group held."""

    @initialize(
        b=st.integers(1, 4), g=st.integers(1, 2), lead=st.integers(0, 3), slack=st.sampled_from([0, 0, 1, 2, 5])
    )
    def start(self, b: int, g: int, lead: int, slack: int) -> None:
        self.b, self.g, self.lead, self.bound = b, g, lead, lead + slack
        self.buffer = RolloutBuffer(b, g, self.bound, lead)
        self.running: dict[int, Ticket] = {}
        self.ready: dict[int, LazyStackedTensorDict] = {}
        self.trained: set[int] = set()
        self.training = False

    def group(self, ticket: Ticket, versions: list[int]) -> LazyStackedTensorDict:
        prompt = Prompt(ticket.ticket_id, Problem(0, "", ""), "", (1, 2))
        n = len(versions)
        responses = [
            Response(
                k,
                [ticket.ticket_id * 10 + k] * (n + k),
                [-0.1] * (n + k),
                versions + versions[:1] * k,
                FinishReason.STOP,
            )
            for k in range(self.g)
        ]
        return schema.stack_group([schema.make_trajectory(prompt, ticket, r) for r in responses])

    @rule(times=st.integers(1, 12))
    def admit(self, times: int) -> None:
        for _ in range(times):
            ticket = self.buffer.admit()
            if ticket is None:
                break
            assert ticket.version == self.buffer.published
            self.running[ticket.ticket_id] = ticket

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        for ticket_id in data.draw(
            st.lists(st.sampled_from(sorted(self.running)), min_size=1, max_size=6, unique=True)
        ):
            ticket = self.running.pop(ticket_id)
            version = st.integers(ticket.version, self.buffer.published)
            group = self.group(ticket, sorted(data.draw(st.lists(version, min_size=1, max_size=3))))
            self.ready[ticket_id] = group.clone()
            self.buffer.commit(ticket_id, group)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        ticket_id = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[ticket_id]
        self.buffer.refund(ticket_id, data.draw(st.sampled_from(["failed", "rejected"])))

    @precondition(lambda self: self.running)
    @rule()
    def all_finish(self) -> None:
        for ticket_id, ticket in self.running.items():
            group = self.group(ticket, [ticket.version])
            self.ready[ticket_id] = group.clone()
            self.buffer.commit(ticket_id, group)
        self.running.clear()

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        alive = sorted({**self.running, **self.ready})
        waits_for, reason = self.buffer.straggler(), self.buffer.why_waiting()
        batch = self.buffer.take()
        assert (batch is not None) == (reason == "nothing: a batch is ready")
        if batch is None:
            assert self.running or len(self.ready) < self.b, "deadlock: everything is finished"
            assert (waits_for is None) == (not self.running)
            assert waits_for is None or waits_for.ticket_id in self.running
            return
        self.training = True
        rows = batch.groups.unbind(0)
        ids = [int(row[schema.TICKET_ID]) for row in rows][:: self.g]
        assert ids == sorted(self.ready)[: self.b], "the oldest finished, in order of admission"
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
        alive = sorted({**self.running, **self.ready})
        assert [t.ticket_id for t in self.buffer.unserved()] == alive
        state = json.loads(json.dumps(self.buffer.state_dict()))
        self.buffer = RolloutBuffer(self.b, self.g, self.bound, self.lead)
        self.buffer.load_state_dict(state)
        self.running.clear()
        self.ready.clear()
        assert self.buffer.published * self.b == len(self.trained)

    @invariant()
    def tickets_balance(self) -> None:
        if not hasattr(self, "buffer"):
            return
        counts = self.buffer.ticket_counts()
        assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
        assert counts["refunded"] == sum(self.buffer.refund_reasons.values())
        assert counts["committed"] == len(self.trained) + len(self.ready)
        assert (self.buffer.outstanding, self.buffer.ready) == (len(self.running), len(self.ready))
        assert len(self.running) + len(self.ready) <= (self.lead + 1) * self.b

    @invariant()
    def nothing_stands_still(self) -> None:
        """With nothing running there is a batch to take, one to publish, or a ticket to give."""
        if hasattr(self, "buffer") and not self.running and not self.training and len(self.ready) < self.b:
            assert self.buffer._budget.can_admit()

    @invariant()
    def serving_in_order_is_feasible(self) -> None:
        if not hasattr(self, "buffer"):
            return
        version = self.buffer.published + self.training
        for position, ticket in enumerate(self.buffer.unserved()):
            assert version + position // self.b - ticket.version <= self.bound


BufferMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestBufferMachine = BufferMachine.TestCase
