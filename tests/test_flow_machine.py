"""Random admissions, verdicts, refunds, takes, publications and resumes of the flow against a model."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_flow import MIXED, RIGHT, WRONG, G, finish, make_flow

from vapo_async.buffer import DynamicSampling
from vapo_async.config import RunError
from vapo_async.flow import Assignment, Flow
from vapo_async.models.char_tokenizer import build_char_tokenizer
from vapo_async.schema import CORRECT, TICKET_ID


class FlowMachine(RuleBasedStateMachine):
    """The model: what runs, what is ready with which verdicts, and which prompts are gone."""

    tokenizer = build_char_tokenizer()

    @initialize(
        b=st.integers(1, 3),
        lead=st.integers(0, 2),
        slack=st.sampled_from([0, 0, 1, 3]),
        pretraining=st.integers(0, 2),
        patience=st.sampled_from([1, 4, 1000]),
    )
    def start(self, b: int, lead: int, slack: int, pretraining: int, patience: int) -> None:
        self.b, self.lead, self.bound, self.pretraining, self.patience = b, lead, lead + slack, pretraining, patience
        self.flow = self.new_flow()
        self.running: dict[int, Assignment] = {}
        self.ready: dict[int, tuple[bool, ...]] = {}  # committed, not taken: the verdicts
        self.unjudged: set[int] = set()
        self.gone: set[int] = set()  # group ids of prompts that were committed or refused
        self.served = self.in_a_row = self.refused = self.lost = self.dropped = 0
        self.training = False

    def new_flow(self) -> Flow:
        sampling = DynamicSampling(self.patience, exempt=self.pretraining * self.b)
        return make_flow(self.tokenizer, self.bound, self.lead, self.b, sampling)

    @rule(most=st.integers(1, 8))
    def admit(self, most: int) -> None:
        for assignment in self.flow.admit(most):
            held = {a.prompt.group_id for a in self.running.values()}
            assert assignment.prompt.group_id not in held | self.gone
            assert assignment.ticket.version == self.flow.published
            self.running[assignment.ticket.ticket_id] = assignment

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.running)), min_size=1, max_size=4, unique=True))
        for ticket_id in chosen:
            verdicts = data.draw(st.sampled_from([MIXED, RIGHT, WRONG]))
            judged = self.served + len(self.ready) >= self.pretraining * self.b
            wanted = not judged or verdicts == MIXED
            assignment = self.running.pop(ticket_id)
            assert finish(self.flow, assignment, verdicts) == wanted
            self.gone.add(assignment.prompt.group_id)
            if wanted:
                self.ready[ticket_id] = verdicts
                self.unjudged |= set() if judged else {ticket_id}
                self.in_a_row = 0
            else:
                self.in_a_row, self.refused = self.in_a_row + 1, self.refused + 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        ticket_id = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[ticket_id]
        self.flow.refund(ticket_id, "worker lost")
        self.lost += 1

    @precondition(lambda self: not self.training)
    @rule()
    def take(self) -> None:
        try:
            batch = self.flow.take()
        except RunError:
            assert self.in_a_row >= self.patience
            self.in_a_row = 0
            return
        if batch is None:
            assert self.in_a_row < self.patience
            self.admit(1)
            assert self.running, "deadlock: nothing to train on, nothing running, no ticket"
            return
        assert len(batch.ages) == self.b and max(batch.ages) <= self.bound
        rows = batch.groups.unbind(0)
        for group in (rows[i : i + G] for i in range(0, len(rows), G)):
            ticket_id = int(group[0][TICKET_ID])
            verdicts = self.ready.pop(ticket_id)
            assert tuple(bool(t[CORRECT]) for t in group) == verdicts
            assert batch.version < self.pretraining or verdicts == MIXED or ticket_id in self.unjudged
        self.served += self.b
        self.training = True

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        self.flow.publish()
        self.training = False

    @precondition(lambda self: not self.training)
    @rule()
    def resume(self) -> None:
        state = json.loads(json.dumps(self.flow.state_dict()))
        self.dropped += len(self.running) + len(self.ready)
        self.flow = self.new_flow()
        self.flow.load_state_dict(state)
        again = sorted(entry[0] for entry in state["stream"]["returned"])
        assert {a.prompt.group_id for a in self.running.values()} <= set(again)
        assert len(again) >= len(self.running) + len(self.ready)
        self.gone -= set(again)  # groups that were ready are generated again
        self.running.clear()
        self.ready.clear()
        self.in_a_row = 0

    @invariant()
    def tickets_balance(self) -> None:
        if not hasattr(self, "flow"):
            return
        counters = self.flow.counters()
        counts, reasons = counters.tickets, counters.refund_reasons
        assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
        assert counts["outstanding"] == len(self.running)
        assert counts["committed"] == self.served + len(self.ready)
        assert counts["refunded"] == self.refused + self.lost + self.dropped
        assert reasons["all right"] + reasons["all wrong"] == self.refused
        assert len(self.unjudged) <= self.pretraining * self.b + self.dropped


FlowMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestFlowMachine = FlowMachine.TestCase
