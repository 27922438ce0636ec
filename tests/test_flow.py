"""Tickets and prompts together: nothing is lost by a refund, a drop or a checkpoint; refused groups never come back."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from vapo_async.buffer import DynamicSampling, Lengths, RolloutBuffer, StragglerWatch, TicketError
from vapo_async.config import ChainSumTaskConfig, RunError
from vapo_async.flow import Assignment, Flow
from vapo_async.prompts.stream import PromptStream
from vapo_async.prompts.tasks import build_task
from vapo_async.schema import (
    CORRECT,
    GROUP_ID,
    FinishReason,
    Response,
    Score,
    make_trajectory,
    set_score,
    stack_group,
)
from vapo_async.state import State, read_state, write_state

B, G = 2, 2
TASK = ChainSumTaskConfig(train_problems=50, heldout_problems=4)
PROBLEMS = build_task(TASK, 0)
MIXED = (True, False)
RIGHT = (True, True)
WRONG = (False, False)


def make_flow(
    tokenizer: PreTrainedTokenizerBase,
    max_staleness: int = 2,
    lead: int = 1,
    groups_per_batch: int = B,
    sampling: DynamicSampling | None = None,
    *,
    timeout_s: float | None = None,
    max_drops: int = 2,
    capacity: int | None = None,
    max_running: int | None = None,
) -> Flow:
    stream = PromptStream(PROBLEMS, tokenizer, TASK, 0)
    buffer = RolloutBuffer(groups_per_batch, G, max_staleness, lead, capacity=capacity, max_running=max_running)
    return Flow(stream, buffer, sampling, None if timeout_s is None else StragglerWatch(timeout_s), max_drops)


def finish(flow: Flow, assignment: Assignment, verdicts: tuple[bool, ...] = MIXED, tokens: int = 2) -> bool:
    """Commits a made-up group of responses of ``tokens`` tokens, by the weights of the ticket's admission."""
    ticket = assignment.ticket
    trajectories = [
        make_trajectory(
            assignment.prompt,
            ticket,
            Response(i, [3] * tokens, [-1.0] * tokens, [ticket.version] * tokens, FinishReason.STOP),
        )
        for i in range(G)
    ]
    for trajectory, correct in zip(trajectories, verdicts, strict=True):
        set_score(trajectory, Score(correct, 1.0 if correct else -1.0))
    return flow.commit(ticket.ticket_id, stack_group(trajectories))


def test_the_lead_limits_what_is_handed_out(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer)
    first = flow.admit(10)
    assert len(first) == 2 * B
    assert flow.admit(1) == []
    for assignment in first[:B]:
        finish(flow, assignment)
    batch = flow.take()
    assert batch is not None
    assert batch.ages == [0, 0]
    assert flow.admit(1) == [], "taking is not publishing"
    assert flow.publish() == 1
    assert len(flow.admit(10)) == B


def test_a_refunded_prompt_comes_first_under_its_group_id(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer)
    first = flow.admit(3)
    flow.refund(first[1].ticket.ticket_id, "worker lost")
    again = flow.admit(1)[0]
    assert again.prompt == first[1].prompt
    assert again.ticket.ticket_id not in {a.ticket.ticket_id for a in first}
    assert flow.counters().tickets == {"charged": 4, "committed": 0, "refunded": 1, "outstanding": 3}
    assert flow.counters().refund_reasons == {"worker lost": 1}


def saved(flow: Flow, folder: Path, carried: dict[int, list[Response]] | None = None) -> State:
    """Through the files of a checkpoint."""
    write_state(flow.state_dict(carried), folder, "flow")
    return read_state(folder, "flow")


def assert_same(first: State, second: State) -> None:
    assert json.loads(json.dumps(first.data)) == json.loads(json.dumps(second.data))
    assert first.tensors.keys() == second.tensors.keys()
    for key, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[key]) and tensor.dtype == second.tensors[key].dtype


def test_a_checkpoint_holds_ready_groups_and_running_tickets(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    flow = make_flow(tokenizer)
    for assignment in flow.admit(2 * B)[:B]:
        finish(flow, assignment)
    flow.take()
    flow.publish()
    running = flow.admit(10)  # beside tickets 2 and 3
    finish(flow, running[0])  # ticket 4 is ready
    state = saved(flow, tmp_path)
    other = make_flow(tokenizer)
    other.load_state_dict(state)
    assert_same(other.state_dict(), state)
    assert other.counters() == flow.counters() and other.why_waiting() == flow.why_waiting()
    resumed = other.admit(10)
    assert [(a.ticket.ticket_id, a.ticket.version) for a in resumed] == [(2, 0), (3, 0), (5, 1)], "the same tickets"
    assert [a.prompt.group_id for a in resumed] == [2, 3, 5] and resumed[2].prompt == running[1].prompt
    finish(other, resumed[1])
    batch = other.take()
    assert batch is not None and batch.tickets == [3, 4], "what was ready is trained on"


def test_carried_responses_go_to_whoever_takes_the_ticket(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    flow = make_flow(tokenizer)
    first, second, third = flow.admit(3, "a")
    part = Response(1, [3, 4], [-0.125, -0.34375], [0, 0], FinishReason.ABORTED)
    whole = Response(0, [5, 6, 1], [-0.5, -(2.0**-30), -7.25], [0, 0, 0], FinishReason.STOP)
    finish(flow, third)
    partial = {
        second.ticket.ticket_id: [part, whole],
        third.ticket.ticket_id: [part],  # has ended meanwhile
    }
    state = saved(flow, tmp_path, partial)
    other = make_flow(tokenizer)
    other.load_state_dict(state)
    assert_same(other.state_dict(), state)
    assert other.admit(1, "b") == [first]
    assert other.admit(1, "b") == [Assignment(second.ticket, second.prompt, (part, whole))]
    assert other.admit(1, "b")[0].ticket.ticket_id == 3
    assert other.lose("b") == [0, 1, 3]


def test_owned_tickets_are_not_handed_out_again(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer)
    first, second, third = flow.admit(3)
    other = make_flow(tokenizer)
    other.load_state_dict(flow.state_dict(), owned=[0, 2])
    assert other.admit(9, "late")[0] == second
    assert finish(other, first) and finish(other, third) and finish(other, second)
    assert other.lose("") == []


def test_orphans_keep_to_a_lower_number_of_running_groups(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer)
    handed_out = flow.admit(4)
    other = make_flow(tokenizer, max_running=2)
    other.load_state_dict(flow.state_dict())
    assert other.admit(9) == handed_out[:2]
    finish(other, handed_out[0])
    assert other.admit(9) == handed_out[2:3]
    other.close()
    finish(other, handed_out[1])
    assert other.admit(9) == [], "a closed flow starts nothing"


def test_a_lower_bound_puts_the_prompts_of_late_tickets_first(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 3, 1)
    slow, *running = flow.admit(9)
    for _ in range(2):
        for _ in range(B):
            finish(flow, running.pop(0))
        assert flow.take() is not None
        flow.publish()
        running += flow.admit(B - len(running))
    assert [a.ticket.version for a in running] == [2, 2]
    other = make_flow(tokenizer, 1, 1)
    other.load_state_dict(flow.state_dict())
    assert other.counters().refund_reasons == {"max_staleness was lowered": 1}
    (*kept, again) = [other.admit(1)[0] for _ in range(3)]
    assert kept == running and again.prompt == slow.prompt
    with pytest.raises(TicketError, match="already ended"):
        finish(other, slow)


def test_a_lost_owners_prompts_come_first_and_its_groups_too_late(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, max_running=4)
    mine, kept = flow.admit(2, "a"), flow.admit(1, "b")
    assert flow.lose("a") == [0, 1] and flow.lose("a") == []
    assert flow.admit(9, "a") == []
    again = flow.admit(9, "b")
    assert [a.prompt for a in again[:2]] == [a.prompt for a in mine]
    before = flow.counters()
    assert not finish(flow, mine[0], tokens=3), "somebody else has its prompt"
    after = flow.counters()
    assert (before.tickets, before.refund_reasons) == (after.tickets, after.refund_reasons)
    assert after.lengths["generated"] == Lengths(G, 3 * G, {4: G}) and after.lengths["dropped"] == Lengths()
    flow.refund(1, "failed")
    assert flow.counters().refund_reasons == {"worker lost": 2}, "a late refund changes nothing either"
    for ticket_id in (0, 1):
        with pytest.raises(TicketError, match="already ended"):
            flow.refund(ticket_id, "failed")
    assert finish(flow, kept[0])


def test_a_straggler_is_dropped_when_nothing_else_fills_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0, timeout_s=10.0, max_drops=1)
    fast, slow = flow.admit(9, "a")
    assert flow.drop_overdue(100.0) is None and flow.seconds_until_overdue(104.0) == 6.0
    assert finish(flow, fast)
    assert flow.seconds_until_overdue(107.0) == 10.0, "the batch came nearer: from here on"
    assert flow.drop_overdue(116.9) is None
    assert flow.drop_overdue(117.0) == (1, "a")
    counters = flow.counters()
    assert counters.drops == 1 and counters.refund_reasons == {"straggler": 1}
    (again,) = flow.admit(9, "b")
    assert again.prompt == slow.prompt and again.ticket.ticket_id == 2
    assert not finish(flow, slow), "its group comes too late"
    assert flow.seconds_until_overdue(118.0) is None and flow.drop_overdue(1e9) is None, "waited for from now on"
    assert finish(flow, again)
    assert flow.take() is not None and flow.publish() == 1
    assert flow.counters().lengths["dropped"].responses == G, "a group that was finished is lost whole"
    assert flow._drops == {}, "forgotten with its prompt"


def test_a_dropped_ticket_that_was_cancelled_is_counted_and_does_not_come_late(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    flow = make_flow(tokenizer, 0, 0)
    slow, _ = flow.admit(9, "a")
    assert flow.drop(slow.ticket.ticket_id) == "a"
    flow.dropped(slow.ticket.ticket_id, [5, 9])
    assert flow.counters().lengths["dropped"] == Lengths(2, 14, {8: 1, 16: 1})
    with pytest.raises(TicketError, match="already ended"):
        finish(flow, slow)


def test_a_slow_ticket_that_others_can_replace_is_not_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 2, 1, timeout_s=10.0)
    slow, *fast = flow.admit(9)
    for now in (0.0, 50.0):
        assert flow.drop_overdue(now) is None, "four run, two are needed"
    for assignment in fast[:2]:
        finish(flow, assignment)
    assert flow.take() is not None and flow.publish() == 1
    assert flow.drop_overdue(100.0) is None and flow.drop_overdue(200.0) is None
    for assignment in [fast[2], *flow.admit(9)][:2]:
        finish(flow, assignment)
    assert flow.take() is not None and flow.publish() == 2
    for assignment in flow.admit(9):
        finish(flow, assignment)
    assert flow.take() is None, "its deadline: 2 + 1 - 0 > 2"
    assert flow.drop_overdue(300.0) is None
    assert flow.drop_overdue(310.0) == (slow.ticket.ticket_id, "")
    assert flow.take() is not None, "the batch that it forbade"


def test_time_counts_only_while_the_learner_waits(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0, groups_per_batch=1, timeout_s=10.0)
    (first,) = flow.admit(9)
    assert flow.drop_overdue(0.0) is None and flow.drop_overdue(9.0) is None
    finish(flow, first)
    assert flow.seconds_until_overdue(20.0) is None
    assert flow.take() is not None and flow.drop_overdue(500.0) is None, "it learns"
    flow.publish()
    flow.admit(9)
    assert flow.drop_overdue(1000.0) is None and flow.seconds_until_overdue(1004.0) == 6.0
    flow.close()
    assert flow.drop_overdue(2000.0) is None, "nobody would generate it again"
    assert make_flow(tokenizer).seconds_until_overdue(0.0) is None


def test_drops_are_remembered_over_a_resume(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def new_flow() -> Flow:
        return make_flow(tokenizer, 0, 0, groups_per_batch=1, timeout_s=1.0, max_drops=2)

    flow = new_flow()
    for drops in range(2):
        flow.admit(9)
        assert flow.drop_overdue(10.0 * drops) is None
        assert flow.drop_overdue(10.0 * drops + 1) == (drops, "")
        state = saved(flow, tmp_path)
        flow = new_flow()
        flow.load_state_dict(state)
    flow.admit(9)
    assert flow.drop_overdue(100.0) is None and flow.drop_overdue(200.0) is None
    assert flow.counters().drops == 2


def test_an_orphan_is_not_dropped_before_anybody_tried(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0, groups_per_batch=1, timeout_s=1.0)
    flow.admit(1)
    other = make_flow(tokenizer, 0, 0, groups_per_batch=1, timeout_s=1.0)
    other.load_state_dict(flow.state_dict())
    assert other.drop_overdue(0.0) is None and other.drop_overdue(50.0) is None
    other.admit(1, "a")
    assert other.drop_overdue(60.0) is None and other.drop_overdue(61.0) == (0, "a")


def test_what_became_of_every_response(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    flow = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=9))
    first, second = flow.admit(9)
    assert finish(flow, first, tokens=3) and not finish(flow, second, WRONG, tokens=8)
    finish(flow, flow.admit(9)[0], tokens=1)
    assert flow.counters().lengths == {
        "generated": Lengths(6, 24, {1: 2, 4: 2, 8: 2}),
        "trained": Lengths(),
        "refused": Lengths(2, 16, {8: 2}),
        "dropped": Lengths(),
    }
    assert flow.take() is not None and flow.publish() == 1
    assert flow.counters().lengths["trained"] == Lengths(4, 8, {1: 2, 4: 2})
    other = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=9))
    other.load_state_dict(saved(flow, tmp_path))
    assert other.counters() == flow.counters()


def test_without_dynamic_sampling_every_group_is_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0)
    assert [finish(flow, a, verdicts) for a, verdicts in zip(flow.admit(9), (RIGHT, WRONG), strict=True)] == [True] * 2
    assert flow.take() is not None and flow.publish() == 1
    assert flow.counters().refund_reasons == {} and flow.state_dict().data["sampling"] is None


def test_a_refused_group_gives_its_place_to_another_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=9))
    first, second = flow.admit(9)
    assert finish(flow, first) and not finish(flow, second, WRONG)
    assert flow.take() is None
    assert flow.why_waiting().endswith("; dynamic sampling refused the last 1 groups")
    (third,) = flow.admit(9)
    assert (third.ticket.ticket_id, third.prompt.group_id) == (2, 2), "a fresh prompt under a new ticket, at once"
    assert not finish(flow, third, RIGHT)
    (fourth,) = flow.admit(9)
    assert finish(flow, fourth)
    batch = flow.take()
    assert batch is not None and [int(t[GROUP_ID]) for t in batch.groups.unbind(0)] == [0, 0, 3, 3]
    counters = flow.counters()
    assert counters.tickets == {"charged": 4, "committed": 2, "refunded": 2, "outstanding": 0}
    assert counters.refund_reasons == {"all right": 1, "all wrong": 1}
    assert (counters.lengths["refused"].responses, counters.lengths["refused"].tokens) == (4, 8)


def test_value_pretraining_takes_every_group_and_no_policy_batch_inherits_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """L = 1: the second batch is finished before the first, value pretraining's only one, is trained on."""
    flow = make_flow(tokenizer, 1, 1, sampling=DynamicSampling(patience=9, exempt=1 * B))
    taken = [finish(flow, assignment, WRONG) for assignment in flow.admit(9)]
    assert taken == [True, True, False, False]
    assert flow.take() is not None and flow.publish() == 1
    assert flow.take() is None


def test_patience_ends_in_take_and_leaves_a_state_that_goes_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    flow = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=3))
    for _ in range(3):
        assert flow.take() is None
        (assignment, *_) = flow.admit(1)
        finish(flow, assignment, WRONG)
    with pytest.raises(RunError, match="refused 3 groups in a row, 0 all right and 3 all wrong"):
        flow.take()
    other = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=3))
    other.load_state_dict(saved(flow, tmp_path))
    assert other.take() is None, "its whole patience: else it would end at once, again and again"
    assert [a.prompt.group_id for a in other.admit(9)] == [3, 4], "refused prompts are behind us"
    assert other.counters() == replace(flow.counters(), tickets=other.counters().tickets)


def test_a_resumed_run_goes_on_in_the_row(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Unless patience was lost, the row is what it was."""

    def new_flow() -> Flow:
        return make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=3))

    flow = new_flow()
    for verdicts in (WRONG, MIXED, RIGHT, WRONG):
        finish(flow, flow.admit(1)[0], verdicts)
    resumed = new_flow()
    resumed.load_state_dict(saved(flow, tmp_path))
    for each in (flow, resumed):
        assert each.take() is None
        finish(each, each.admit(1)[0], WRONG)
        with pytest.raises(RunError, match="3 groups in a row, 1 all right and 2 all wrong"):
            each.take()


def test_a_batch_that_is_ready_goes_before_lost_patience(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 1, 1, sampling=DynamicSampling(patience=2))
    verdicts = (MIXED, MIXED, WRONG, WRONG)
    for assignment, verdict in zip(flow.admit(9), verdicts, strict=True):
        finish(flow, assignment, verdict)
    assert flow.take() is not None and flow.publish() == 1
    with pytest.raises(RunError, match="2 all wrong"):
        flow.take()


def test_a_closed_flow_has_no_patience_to_lose(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=1))
    finish(flow, flow.admit(1)[0], WRONG)
    flow.close()
    assert flow.take() is None, "the user stopped the run: that is not the problems' fault"


@pytest.mark.parametrize(("bound", "lead"), [(0, 0), (1, 1), (4, 1), (4, 4)])
def test_batches_fill_with_mixed_groups_whatever_the_order(
    tokenizer: PreTrainedTokenizerBase, bound: int, lead: int
) -> None:
    """Random completion; nine groups of ten are refused, and half of the completions wait until after a publication."""
    rng = random.Random(bound + 10 * lead)
    flow = make_flow(tokenizer, bound, lead, groups_per_batch=4, sampling=DynamicSampling(patience=1000))
    running: list[Assignment] = []
    oldest = refused = 0
    while flow.published < 25:
        batch = flow.take()
        running += flow.admit(100)
        assert batch is not None or running, "deadlock: nothing to train on, nothing running, no ticket"
        for _ in range(rng.randint(batch is None, 8)):
            if running:
                verdicts = MIXED if rng.random() < 0.1 else rng.choice((RIGHT, WRONG))
                refused += not finish(flow, running.pop(rng.randrange(len(running))), verdicts)
        if batch is not None:
            assert max(batch.ages) <= bound
            right = [bool(trajectory[CORRECT]) for trajectory in batch.groups.unbind(0)]
            assert right == list(MIXED) * 4
            oldest = max(oldest, *batch.ages)
            flow.publish()
    assert refused > 500
    assert oldest <= bound and (bound == 0 or oldest >= 1)
    counts = flow.counters().tickets
    assert counts["refunded"] == refused and counts["committed"] >= 100
    assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
