"""The arithmetic alone, without tensors: random queues, limits that change on resume, many steps."""

import json

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from machines import CountedMachine, run_machine

from vapo_async.buffer import StalenessBudget, choose_batch
from vapo_async.buffer.budget import late


class BudgetMachine(CountedMachine):
    """The queue as the buffer keeps it: [id, admission version, finished] in order of admission."""

    @initialize(b=st.integers(1, 4), lead=st.integers(0, 3), slack=st.integers(0, 3), extra=st.integers(-1, 8))
    def start(self, b: int, lead: int, slack: int, extra: int) -> None:
        self.b, self.bound = b, lead + slack
        self.budget = StalenessBudget(b, self.bound, lead, None if extra < 0 else b + extra)
        self.queue: list[tuple[int, int, bool]] = []
        self.most = self.budget.places
        self.training = False

    @rule(most=st.integers(1, 8))
    def admit(self, most: int) -> None:
        for _ in range(most):
            ticket_id = self.budget.charge()
            if ticket_id is None:
                return
            assert len(self.queue) + self.b * self.training < self.budget.places
            self.queue.append((ticket_id, self.budget.published, False))

    def running(self) -> list[int]:
        return [position for position, (_, _, finished) in enumerate(self.queue) if not finished]

    def finish_at(self, positions: list[int]) -> None:
        for position in positions:
            self.queue[position] = (*self.queue[position][:2], True)

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 255))
    def finish_one(self, which: int) -> None:
        running = self.running()
        self.finish_at([running[which % len(running)]])

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 255))
    def finish_some(self, which: int) -> None:
        self.finish_at([position for i, position in enumerate(self.running()) if which >> (i % 8) & 1])

    @precondition(lambda self: self.running())
    @rule(which=st.integers(0, 255))
    def refund(self, which: int) -> None:
        running = self.running()
        del self.queue[running[which % len(running)]]
        self.budget.refund()

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        choice = choose_batch([entry[1:] for entry in self.queue], self.b, self.bound, self.budget.published)
        if choice.positions is None:
            assert choice.late is None or not self.queue[choice.late][2], "waits for a finished ticket"
            assert self.running() or len(self.queue) < self.b, "deadlock: everything is finished"
            return
        assert choice.positions == [i for i, entry in enumerate(self.queue) if entry[2]][: self.b]
        for position in choice.positions:
            assert self.budget.published - self.queue[position][1] <= self.bound, "older than the bound"
        self.queue = [entry for i, entry in enumerate(self.queue) if i not in choice.positions]
        self.training = True

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        self.budget.publish()
        self.training = False

    @rule()
    def nothing_stands_still(self) -> None:
        """With everything finished there is a batch to publish, one to take, or a ticket to give."""
        queue = [(version, True) for _, version, _ in self.queue]
        positions = choose_batch(queue, self.b, self.bound, self.budget.published).positions
        assert self.training or positions == list(range(self.b)) or self.budget.can_admit()

    @precondition(lambda self: not self.training)
    @rule(lead=st.integers(0, 3), slack=st.integers(0, 3), extra=st.integers(-1, 8), same=st.booleans())
    def resume(self, lead: int, slack: int, extra: int, same: bool) -> None:
        old, bound = self.budget, self.bound
        if same:
            lead, bound, capacity = old.lead, old.max_staleness, old.capacity
        else:
            bound, capacity = lead + slack, None if extra < 0 else self.b + extra
        self.budget = StalenessBudget(self.b, bound, lead, capacity)
        self.budget.load_state_dict(json.loads(json.dumps(old.state_dict())), len(self.queue))
        assert self.budget.state_dict() == old.state_dict()
        gone = late([version for _, version, _ in self.queue], self.b, bound, self.budget.published)
        assert not gone or bound < self.bound, "nobody is late unless the bound was lowered"
        self.queue = [entry for i, entry in enumerate(self.queue) if i not in gone]
        for _ in gone:
            self.budget.refund()
        self.bound, self.most = bound, max(self.budget.places, len(self.queue))

    @invariant()
    def in_time_and_in_balance(self) -> None:
        if not hasattr(self, "budget"):
            return
        budget = self.budget
        version = budget.published + self.training
        assert all(version + i // self.b - entry[1] <= self.bound for i, entry in enumerate(self.queue))
        assert budget.charged - budget.refunded == version * self.b + len(self.queue)
        assert len(self.queue) + self.b * self.training <= self.most


def test_budget_machine() -> None:
    run_machine(BudgetMachine, 500, 70_000)


@pytest.mark.slow
def test_budget_machine_long() -> None:
    run_machine(BudgetMachine, 5_000, 700_000)
