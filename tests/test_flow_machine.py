"""Random work, deaths, drops, late groups, takes, publications and resumes of the flow against a model."""

import json

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from machines import CountedMachine, run_machine
from test_flow import MIXED, RIGHT, WRONG, G, assert_same, finish, make_flow

from vapo_async.buffer import DynamicSampling, TicketError
from vapo_async.config import RunError
from vapo_async.flow import Assignment, Flow
from vapo_async.models.char_tokenizer import build_char_tokenizer
from vapo_async.schema import CORRECT, TICKET_ID, FinishReason, Response
from vapo_async.state import State

TIMEOUT_S = 10.0


class FlowMachine(CountedMachine):
    """The model: who runs what, what is ready with which verdicts, which prompts are gone, and a clock."""

    tokenizer = build_char_tokenizer()

    @initialize(
        b=st.integers(1, 3),
        lead=st.integers(0, 2),
        slack=st.sampled_from([0, 0, 1, 3]),
        pretraining=st.integers(0, 2),
        patience=st.sampled_from([1, 4, 1000]),
        max_drops=st.integers(0, 2),
        extra=st.integers(-1, 4),
        max_running=st.sampled_from([None, 1, 3]),
    )
    def start(
        self,
        b: int,
        lead: int,
        slack: int,
        pretraining: int,
        patience: int,
        max_drops: int,
        extra: int,
        max_running: int | None,
    ) -> None:
        self.b, self.pretraining, self.patience, self.max_drops = b, pretraining, patience, max_drops
        self.flow = self.new_flow(lead, slack, extra, max_running)
        self.running: dict[int, tuple[Assignment, str]] = {}
        self.orphans: dict[int, Assignment] = {}
        self.cancelled: dict[int, Assignment] = {}
        self.ready: dict[int, tuple[Assignment, tuple[bool, ...]]] = {}
        self.unjudged: set[int] = set()
        self.gone: set[int] = set()  # group ids of prompts that were trained on or refused
        self.prompts_dropped: dict[int, int] = {}
        self.lost: set[str] = set()
        self.counts = dict.fromkeys(("served", "refused", "refunded", "lost", "dropped", "late", "generated"), 0)
        self.in_a_row = 0
        self.now, self.quiet_since = 0.0, 0.0
        self.training = False

    def new_flow(self, lead: int, slack: int, extra: int, max_running: int | None) -> Flow:
        self.settings, self.bound, self.max_running = (lead, slack, extra, max_running), lead + slack, max_running
        sampling = DynamicSampling(self.patience, exempt=self.pretraining * self.b)
        return make_flow(
            self.tokenizer,
            lead + slack,
            lead,
            self.b,
            sampling,
            timeout_s=TIMEOUT_S,
            max_drops=self.max_drops,
            capacity=None if extra < 0 else self.b + extra,
            max_running=max_running,
        )

    def held(self) -> list[Assignment]:
        """Of every ticket in the queue."""
        return [
            *(assignment for assignment, _ in self.running.values()),
            *self.orphans.values(),
            *(assignment for assignment, _ in self.ready.values()),
        ]

    @rule(most=st.integers(1, 8), owner=st.sampled_from("abcd"))
    def admit(self, most: int, owner: str) -> None:
        assignments = self.flow.admit(most, owner)
        assert not assignments or owner not in self.lost
        for assignment in assignments:
            ticket_id = assignment.ticket.ticket_id
            if self.orphans:
                assert ticket_id == min(self.orphans), "orphans first, in order"
                assert assignment == self.orphans.pop(ticket_id), "the same ticket, prompt and carried responses"
            else:
                assert assignment.ticket.version == self.flow.published
                assert assignment.prompt.group_id not in {a.prompt.group_id for a in self.held()} | self.gone
            self.running[ticket_id] = assignment, owner
        assert self.max_running is None or not assignments or len(self.running) <= self.max_running

    def finish(self, ticket_id: int, verdicts: tuple[bool, ...]) -> None:
        judged = self.counts["served"] + len(self.ready) >= self.pretraining * self.b
        wanted = not judged or verdicts == MIXED
        assignment, _ = self.running.pop(ticket_id)
        assert finish(self.flow, assignment, verdicts) == wanted
        self.counts["generated"] += G
        self.prompts_dropped.pop(assignment.prompt.group_id, None)
        if wanted:
            self.ready[ticket_id] = assignment, verdicts
            self.unjudged |= set() if judged else {ticket_id}
            self.in_a_row = 0
            if len(self.ready) <= self.b:
                self.quiet_since = self.now
        else:
            self.gone.add(assignment.prompt.group_id)
            self.in_a_row, self.counts["refused"] = self.in_a_row + 1, self.counts["refused"] + 1

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 255), verdicts=st.sampled_from([MIXED, MIXED, RIGHT, WRONG]))
    def finish_one(self, which: int, verdicts: tuple[bool, ...]) -> None:
        self.finish(sorted(self.running)[which % len(self.running)], verdicts)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 255))
    def finish_some(self, which: int) -> None:
        for i, ticket_id in enumerate(sorted(self.running)):
            if which >> (i % 8) & 1:
                self.finish(ticket_id, MIXED)

    @precondition(lambda self: self.cancelled)
    @rule(which=st.integers(0, 255), committed=st.booleans())
    def too_late(self, which: int, committed: bool) -> None:
        ticket_id = sorted(self.cancelled)[which % len(self.cancelled)]
        assignment, before = self.cancelled.pop(ticket_id), self.flow.state_dict() if not self.training else None
        if committed:
            assert not finish(self.flow, assignment)
            self.counts["generated"] += G
        else:
            self.flow.refund(ticket_id, "failed")
        with pytest.raises(TicketError):
            self.flow.refund(ticket_id, "again")
        if before is not None:
            after = self.flow.state_dict()
            assert {**after.data, "lengths": 0} == {**before.data, "lengths": 0}, "only lengths are counted"

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 255))
    def refund(self, which: int) -> None:
        ticket_id = sorted(self.running)[which % len(self.running)]
        del self.running[ticket_id]
        self.flow.refund(ticket_id, "failed")
        self.counts["refunded"] += 1

    @rule(owner=st.sampled_from("abc"))
    def lose(self, owner: str) -> None:
        lost = [ticket_id for ticket_id, (_, whose) in self.running.items() if whose == owner]
        assert sorted(self.flow.lose(owner)) == sorted(lost)
        for ticket_id in lost:
            self.cancelled[ticket_id] = self.running.pop(ticket_id)[0]
        self.lost.add(owner)
        self.counts["lost"] += len(lost)

    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S, 25.0]))
    def wait(self, seconds: float) -> None:
        first = self.flow.seconds_until_overdue(self.now)
        assert first is None or 0 <= first <= TIMEOUT_S
        self.now += seconds
        while (dropped := self.flow.drop_overdue(self.now)) is not None:
            ticket_id, owner = dropped
            alive = len(self.running) + len(self.orphans) + len(self.ready)
            assert not self.training
            assert len(self.ready) >= self.b or alive <= self.b, "others can fill the batch"
            assignment, whose = self.running.pop(ticket_id)
            assert whose == owner and self.now - self.quiet_since >= TIMEOUT_S
            times = self.prompts_dropped.get(assignment.prompt.group_id, 0) + 1
            assert times <= self.max_drops, "starves"
            self.prompts_dropped[assignment.prompt.group_id] = times
            self.cancelled[ticket_id] = assignment
            self.counts["dropped"] += 1

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
            return
        assert len(batch.ages) == self.b and max(batch.ages) <= self.bound
        rows = batch.groups.unbind(0)
        for group in (rows[i : i + G] for i in range(0, len(rows), G)):
            ticket_id = int(group[0][TICKET_ID])
            assignment, verdicts = self.ready.pop(ticket_id)
            assert tuple(bool(t[CORRECT]) for t in group) == verdicts
            assert batch.version < self.pretraining or verdicts == MIXED or ticket_id in self.unjudged
            assert assignment.prompt.group_id not in self.gone, "trained twice"
            self.gone.add(assignment.prompt.group_id)
        self.counts["served"] += self.b
        self.quiet_since = self.now
        self.training = True

    @precondition(lambda self: self.training)
    @rule()
    def publish(self) -> None:
        self.flow.publish()
        self.training = False
        self.quiet_since = self.now

    @rule()
    def all_that_runs_finishes(self) -> None:
        """From any state a batch comes, without a drop: so nothing deadlocks and nothing starves."""
        if self.training:
            self.publish()
        for _ in range(2 * self.b + len(self.orphans) + 2):
            self.admit(100, "z")
            for ticket_id in sorted(self.running):
                self.finish(ticket_id, MIXED)
            self.take()
            if self.training:
                return
        raise AssertionError(f"deadlock: {self.flow.why_waiting()}")

    @precondition(lambda self: not self.training)
    @rule(split=st.integers(0, 255), tokens=st.integers(0, 2))
    def resume(self, split: int, tokens: int) -> None:
        """The owner "a" keeps some of the running tickets, the rest are orphans with what they have."""
        owned = {ticket_id for i, ticket_id in enumerate(sorted(self.running)) if split >> (i % 8) & 1}
        part = Response(0, [3] * tokens, [-0.25] * tokens, [0] * tokens, FinishReason.ABORTED)
        carried = {ticket_id: [part] for ticket_id in self.running if ticket_id not in owned}
        old, saved = self.flow, self.flow.state_dict({**carried, 10**9: [part]})
        self.flow = self.new_flow(*self.settings)
        self.flow.load_state_dict(State(json.loads(json.dumps(saved.data)), saved.tensors), owned, "z")
        assert_same(self.flow.state_dict(), saved)
        assert self.flow.counters() == old.counters() and self.flow.why_waiting() == old.why_waiting()
        for ticket_id, responses in carried.items():
            assignment, _ = self.running.pop(ticket_id)
            self.orphans[ticket_id] = Assignment(assignment.ticket, assignment.prompt, (*responses,))
        self.running = {key: (assignment, "z") for key, (assignment, _) in self.running.items()}
        self.after_resume()

    @precondition(lambda self: not self.training)
    @rule(
        lead=st.integers(0, 2),
        slack=st.sampled_from([0, 1, 3]),
        extra=st.integers(-1, 4),
        max_running=st.sampled_from([None, 2]),
    )
    def resume_with_other_limits(self, lead: int, slack: int, extra: int, max_running: int | None) -> None:
        saved, bound = self.flow.state_dict(), self.bound
        before = {assignment.ticket.ticket_id: assignment for assignment in self.held()}
        self.flow = self.new_flow(lead, slack, extra, max_running)
        self.flow.load_state_dict(saved)
        kept = {ticket.ticket_id for ticket in self.flow._buffer.unserved()}
        assert kept <= before.keys() and (kept == before.keys() or self.bound < bound)
        running = {key: Assignment(a.ticket, a.prompt) for key, (a, _) in self.running.items()}
        self.orphans = {key: a for key, a in sorted((running | self.orphans).items()) if key in kept}
        self.ready = {key: entry for key, entry in self.ready.items() if key in kept}
        self.counts["late"] += len(before) - len(kept)
        self.running = {}
        again = {group_id for group_id, _ in self.flow._stream._returned}
        assert {before[key].prompt.group_id for key in before.keys() - kept} <= again
        self.after_resume()

    def after_resume(self) -> None:
        self.cancelled.clear()
        self.lost.clear()
        self.quiet_since = self.now

    @invariant()
    def tickets_balance(self) -> None:
        if not hasattr(self, "flow"):
            return
        counters, mine = self.flow.counters(), self.counts
        counts, reasons, lengths = counters.tickets, counters.refund_reasons, counters.lengths
        assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
        assert counts["outstanding"] == len(self.running) + len(self.orphans)
        assert counts["committed"] == mine["served"] + len(self.ready)
        assert reasons["all right"] + reasons["all wrong"] == mine["refused"]
        assert reasons.get("worker lost", 0) == mine["lost"]
        assert reasons.get("straggler", 0) == mine["dropped"] == counters.drops
        assert reasons.get("max_staleness was lowered", 0) == mine["late"]
        assert counts["refunded"] == sum(mine[key] for key in ("refused", "lost", "dropped", "late", "refunded"))
        assert lengths["generated"].responses == mine["generated"]
        assert lengths["trained"].responses == mine["served"] * G
        assert lengths["refused"].responses == mine["refused"] * G

    @invariant()
    def every_prompt_is_somewhere_once(self) -> None:
        if not hasattr(self, "flow"):
            return
        stream = self.flow._stream
        held = [assignment.prompt.group_id for assignment in self.held()]
        returned = [group_id for group_id, _ in stream._returned]
        assert sorted([*held, *returned, *self.gone]) == list(range(stream._next_group_id))


def test_flow_machine() -> None:
    torch.set_num_threads(1)
    run_machine(FlowMachine, 130, 15_000)


@pytest.mark.slow
def test_flow_machine_long() -> None:
    run_machine(FlowMachine, 1_300, 160_000)
