"""The buffer's contract, one promise per test."""

import random
from pathlib import Path

import pytest
import torch
from tensordict import LazyStackedTensorDict

from vapo_async import schema
from vapo_async.buffer import PublicationError, RolloutBuffer, StalenessViolation, TicketError
from vapo_async.config import ConfigError
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Ticket
from vapo_async.state import State, read_state, write_state


def make_group(ticket: Ticket, group_size: int = 2, version: int | None = None) -> LazyStackedTensorDict:
    """Ragged responses of 1 … G tokens after a prompt of 3."""
    prompt = Prompt(ticket.ticket_id + 100, Problem(0, "1+1", "2"), "1+1", (5, 6, 7))
    now = ticket.version if version is None else version
    responses = [
        Response(g, [ticket.ticket_id] * (g + 1), [-0.5 * g] * (g + 1), [now] * (g + 1), FinishReason.STOP)
        for g in range(group_size)
    ]
    return schema.stack_group([schema.make_trajectory(prompt, ticket, response) for response in responses])


def admit_all(buffer: RolloutBuffer) -> list[Ticket]:
    tickets = []
    while (ticket := buffer.admit()) is not None:
        tickets.append(ticket)
    return tickets


def commit(buffer: RolloutBuffer, *tickets: Ticket) -> None:
    for ticket in tickets:
        buffer.commit(ticket.ticket_id, make_group(ticket))


def taken_ids(buffer: RolloutBuffer) -> list[int] | None:
    batch = buffer.take()
    return None if batch is None else [int(t[schema.TICKET_ID]) for t in batch.groups.unbind(0)][::2]


def test_synchronous() -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=0, lead=0)
    for version in range(3):
        tickets = admit_all(buffer)
        assert [t.version for t in tickets] == [version, version]
        commit(buffer, tickets[1])
        assert buffer.take() is None
        commit(buffer, tickets[0])
        batch = buffer.take()
        assert batch is not None and batch.ages == [0, 0] and batch.version == version
        assert buffer.admit() is None, "nothing is admitted while the batch is being trained"
        assert buffer.publish() == version + 1


def test_contents_come_back_in_order_bit_equal_and_once() -> None:
    buffer = RolloutBuffer(2, 3, max_staleness=3, lead=1)
    tickets = admit_all(buffer)
    groups = {t.ticket_id: make_group(t, 3) for t in tickets}
    expected = {i: group.clone() for i, group in groups.items()}
    for i in (3, 1, 2, 0):
        buffer.commit(i, groups[i])
    assert (buffer.ready, buffer.outstanding) == (4, 0)
    for ids in ([0, 1], [2, 3]):
        batch = buffer.take()
        assert batch is not None and batch.groups.batch_size == torch.Size([6])
        rows = [t for i in ids for t in expected[i].unbind(0)]
        for got, want in zip(batch.groups.unbind(0), rows, strict=True):
            assert set(got.keys()) == set(want.keys())
            assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want.keys())  # noqa: SIM118
        buffer.publish()
    assert buffer.ready == 0 and buffer.take() is None


def test_a_slow_ticket_is_overtaken_then_waited_for() -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=2, lead=0)
    slow, *fast = admit_all(buffer)
    served = []
    for _ in range(3):
        commit(buffer, *fast)
        extra = buffer.ready < 2
        if extra:
            assert buffer.take() is None and buffer.admit() is None
            break
        served.append(taken_ids(buffer))
        buffer.publish()
        fast = admit_all(buffer)
    assert buffer.straggler() == slow
    assert "ticket 0 (admitted at version 0" in buffer.why_waiting()
    commit(buffer, slow)
    assert taken_ids(buffer) == [0, 1]


def test_deadline_holds_the_batch_back() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=2, lead=1)
    slow, fast = admit_all(buffer)
    for _ in range(2):
        commit(buffer, fast)
        assert taken_ids(buffer) == [fast.ticket_id]
        buffer.publish()
        (fast,) = admit_all(buffer)
    commit(buffer, fast)
    assert buffer.take() is None and buffer.straggler() == slow
    assert "would become older than max_staleness=2" in buffer.why_waiting()
    buffer.refund(slow.ticket_id, "straggler")
    assert buffer.why_waiting() == "nothing: a batch is ready" and buffer.straggler() is None
    assert taken_ids(buffer) == [fast.ticket_id]
    assert "has not been published" in buffer.why_waiting()


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_lead_equal_to_bound_is_first_in_first_out_after_version_s(bound: int) -> None:
    rng, buffer = random.Random(bound), RolloutBuffer(3, 2, max_staleness=bound, lead=bound)
    running: list[Ticket] = []
    while buffer.published < 12:
        running += admit_all(buffer)
        ids = taken_ids(buffer)
        if ids is None:
            commit(buffer, running.pop(rng.randrange(len(running))))
            continue
        if buffer.published > bound:
            assert ids == list(range(3 * buffer.published, 3 * buffer.published + 3))
        buffer.publish()


def test_age_counts_from_the_oldest_generated_token() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=3, lead=1)
    first, second = admit_all(buffer)
    commit(buffer, first)
    buffer.take()
    buffer.publish()
    group = make_group(second, version=1)
    buffer.commit(second.ticket_id, group)
    batch = buffer.take()
    assert batch is not None and batch.ages == [0], "admitted at 0, generated by version 1"


def test_second_gate_fires_if_the_first_one_is_broken() -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=1, lead=0)
    commit(buffer, *admit_all(buffer))
    buffer._budget.published = 2  # behind the buffer's back
    with pytest.raises(StalenessViolation, match=r"max_staleness=1 at version 2: ages by ticket \{0: 2, 1: 2\}"):
        buffer.take()


def test_a_ticket_ends_exactly_once() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=2, lead=2)
    first, second, third = admit_all(buffer)
    commit(buffer, first)
    buffer.refund(second.ticket_id, "failed")
    for ended in (first, second):
        with pytest.raises(TicketError, match="already ended"):
            commit(buffer, ended)
        with pytest.raises(TicketError, match="already ended"):
            buffer.refund(ended.ticket_id, "again")
    assert taken_ids(buffer) == [0]
    with pytest.raises(TicketError, match="already ended"):
        buffer.refund(first.ticket_id, "after take")
    with pytest.raises(TicketError, match="ticket 9 was never given"):
        buffer.refund(9, "?")
    assert third.ticket_id == 2
    assert buffer.ticket_counts() == {"charged": 3, "committed": 1, "refunded": 1, "outstanding": 1}
    assert buffer.refund_reasons == {"failed": 1}


def test_bad_groups_are_refused_and_the_ticket_stays() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=1, lead=1)
    ticket, other = admit_all(buffer)
    with pytest.raises(ValueError, match="holds 3 trajectories, group_size=2"):
        buffer.commit(ticket.ticket_id, make_group(ticket, 3))
    with pytest.raises(ValueError, match=r"key 'ticket_id' holds \[1\]"):
        buffer.commit(ticket.ticket_id, make_group(other))
    with pytest.raises(ValueError, match="goes back to version -1"):
        buffer.commit(ticket.ticket_id, make_group(ticket, version=-1))
    broken = make_group(ticket)
    broken.tensordicts[1][schema.REWARD] = torch.zeros(1)
    with pytest.raises(ValueError, match="'reward' has shape"):
        buffer.commit(ticket.ticket_id, broken)
    mixed = make_group(ticket)
    mixed.tensordicts[1][schema.GROUP_ID] = torch.tensor(7)
    with pytest.raises(ValueError, match="expected one prompt"):
        buffer.commit(ticket.ticket_id, mixed)
    assert buffer.ready == 0 and buffer.outstanding == 2
    commit(buffer, ticket)


def test_take_and_publish_alternate() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=1, lead=1)
    commit(buffer, *admit_all(buffer))
    with pytest.raises(PublicationError, match="without a batch"):
        buffer.publish()
    buffer.take()
    with pytest.raises(PublicationError, match="has to be published first"):
        buffer.take()
    with pytest.raises(PublicationError, match="save after the publication"):
        buffer.state_dict()


def test_close_ends_admission_and_drains() -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=1, lead=1)
    a, b, c, d = admit_all(buffer)
    buffer.refund(d.ticket_id, "failed")
    buffer.close()
    assert buffer.closed and buffer.admit() is None
    commit(buffer, a, b, c)
    assert taken_ids(buffer) == [0, 1]
    buffer.publish()
    assert buffer.take() is None and buffer.why_waiting() == (
        "1 of 2 groups are finished and no ticket is running (the buffer is closed)"
    )


def save(buffer: RolloutBuffer, folder: Path) -> State:
    """Through the files of a checkpoint."""
    write_state(buffer.state_dict(), folder, "buffer")
    return read_state(folder, "buffer")


def test_resume_goes_on_exactly(tmp_path: Path) -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=2, lead=1)
    a, b, c, d = admit_all(buffer)
    commit(buffer, a, b, c)
    buffer.take()
    buffer.publish()
    before = buffer.ticket_counts()
    state = save(buffer, tmp_path)
    assert buffer.ticket_counts() == before, "saving changes nothing"

    resumed = RolloutBuffer(2, 2, max_staleness=3, lead=1)
    assert resumed.load_state_dict(state) == []
    assert resumed.ticket_counts() == before == {"charged": 4, "committed": 3, "refunded": 0, "outstanding": 1}
    assert resumed.unserved() == [c, d] and resumed.running() == [d] and resumed.ready == 1
    tickets = admit_all(resumed)
    assert tickets == [Ticket(4, 1), Ticket(5, 1)], "no burst: two places of four are taken"
    commit(resumed, tickets[0])
    batch = resumed.take()
    assert batch is not None and batch.tickets == [2, 4] and batch.ages == [1, 0]
    for got, want in zip(batch.groups.unbind(0), make_group(c).unbind(0), strict=False):
        assert all(torch.equal(got[key], want[key]) for key in schema.TRAJECTORY_DTYPES)
    with pytest.raises(TicketError, match="load first"):
        resumed.load_state_dict(state)


def test_a_lower_lead_or_capacity_brings_everything_back_and_admits_later(tmp_path: Path) -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=3, lead=3)
    tickets = admit_all(buffer)
    commit(buffer, *tickets[:3])
    state = save(buffer, tmp_path)
    for resumed in (RolloutBuffer(2, 2, 3, 0), RolloutBuffer(2, 2, 3, 3, capacity=2)):
        assert resumed.load_state_dict(state) == [] and resumed.unserved() == tickets
        commit(resumed, *tickets[3:])
        for version in range(4):
            assert resumed.admit() is None, f"{8 - 2 * version} tickets are more than the two that may be there"
            assert taken_ids(resumed) == [2 * version, 2 * version + 1]
            assert resumed.publish() == version + 1
        assert len(admit_all(resumed)) == 2


def test_a_lower_bound_refunds_what_would_be_too_old(tmp_path: Path) -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=3, lead=1)
    slow, fast = admit_all(buffer)
    for _ in range(2):
        commit(buffer, fast)
        buffer.take()
        buffer.publish()
        (fast,) = admit_all(buffer)
    state = save(buffer, tmp_path)
    commit(buffer, slow)
    ready_too = save(buffer, tmp_path)
    for saved, committed in ((state, 2), (ready_too, 2)):
        resumed = RolloutBuffer(1, 2, max_staleness=1, lead=1)
        assert resumed.load_state_dict(saved) == [slow], "2 + 0 - 0 > 1, whether it was ready or not"
        assert resumed.refund_reasons == {"max_staleness was lowered": 1}
        assert resumed.ticket_counts() == {"charged": 4, "committed": committed, "refunded": 1, "outstanding": 1}
        assert resumed.unserved() == [fast] == resumed.running()
        assert admit_all(resumed) == [Ticket(4, 2)], "its place is free"


def test_a_saved_group_that_breaks_the_schema_is_generated_again() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=1, lead=1)
    first, second = admit_all(buffer)
    commit(buffer, first)
    state = buffer.state_dict()
    del state.tensors[schema.REWARD]
    resumed = RolloutBuffer(1, 2, max_staleness=1, lead=1)
    assert resumed.load_state_dict(state) == [first]
    assert resumed.running() == [second] and resumed.ready == 0
    assert resumed.refund_reasons == {"saved group breaks the schema": 1}


def test_states_that_do_not_fit_are_refused() -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=1, lead=1)
    admit_all(buffer)
    state = buffer.state_dict()
    with pytest.raises(ConfigError, match=r"algorithm\.groups_per_batch=2, this run has 3: resume with .*=2"):
        RolloutBuffer(3, 2, 1, 1).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"algorithm\.group_size=2, this run has 3: resume with .*=2"):
        RolloutBuffer(2, 3, 1, 1).load_state_dict(state)
    state.data["queue"].pop()
    with pytest.raises(ValueError, match="4 != 3"):
        RolloutBuffer(2, 2, 1, 1).load_state_dict(state)


def test_capacity_and_running_tickets_are_bounded() -> None:
    buffer = RolloutBuffer(2, 2, max_staleness=4, lead=4, capacity=5, max_running=3)
    first = admit_all(buffer)
    assert len(first) == 3 and not buffer.can_admit, "three may run at one time"
    commit(buffer, *first)
    assert len(admit_all(buffer)) == 2, "five may be there"
    assert buffer.take() is not None and buffer.admit() is None, "a batch counts until it is published"
    buffer.publish()
    assert len(admit_all(buffer)) == 1, "three run again"


def test_who_holds_everybody_up() -> None:
    """B = 2: only the ticket without which no batch can come."""
    buffer = RolloutBuffer(2, 2, max_staleness=1, lead=1)
    a, b = (buffer.admit() for _ in range(2))
    assert a is not None and b is not None
    assert buffer.straggler() == a and buffer.blocker() is None, "two more could be admitted"
    c, d = admit_all(buffer)
    commit(buffer, b)
    assert buffer.straggler() == a and buffer.blocker() is None, "c or d can fill the batch"
    buffer.close()
    buffer.refund(c.ticket_id, "failed")
    assert buffer.blocker() is None, "d can"
    buffer.refund(d.ticket_id, "failed")
    assert buffer.blocker() == a, "nobody else can"
    late = RolloutBuffer(1, 2, max_staleness=1, lead=1)
    slow, fast = admit_all(late)
    commit(late, fast)
    assert late.blocker() is None and taken_ids(late) == [1] and late.blocker() is None
    late.publish()
    commit(late, *admit_all(late))
    assert late.blocker() == slow, "a batch is there, its deadline forbids it"


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"max_running": 0}, "max_running >= 1"), ({"capacity": 1}, "capacity >= groups_per_batch")],
)
def test_limits_are_checked(settings: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RolloutBuffer(2, 1, 0, 0, **settings)


def test_group_size_is_checked() -> None:
    with pytest.raises(ValueError, match="group_size >= 1"):
        RolloutBuffer(1, 0, 0, 0)
