"""Tickets and prompts together: nothing is lost by a refund or a checkpoint, and refused groups never come back."""

import json
import random

import pytest
from transformers import PreTrainedTokenizerBase

from vapo_async.buffer import DynamicSampling, RolloutBuffer
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
) -> Flow:
    stream = PromptStream(PROBLEMS, tokenizer, TASK, 0)
    return Flow(stream, RolloutBuffer(groups_per_batch, G, max_staleness, lead), sampling)


def finish(flow: Flow, assignment: Assignment, verdicts: tuple[bool, ...] = MIXED) -> bool:
    """Commits a made-up group sampled by the weights of the ticket's admission."""
    ticket = assignment.ticket
    trajectories = [
        make_trajectory(
            assignment.prompt, ticket, Response(i, [3, 1], [-1.0, -1.0], [ticket.version] * 2, FinishReason.STOP)
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


def test_a_checkpoint_gives_unserved_prompts_back_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer)
    for assignment in flow.admit(2 * B)[:B]:
        finish(flow, assignment)
    flow.take()
    flow.publish()
    handed_out = flow.admit(10)
    finish(flow, handed_out[0])  # ready, but not taken: generated again after a resume
    state = flow.state_dict()
    other = make_flow(tokenizer)
    other.load_state_dict(state)
    resumed = other.admit(10)
    assert len(resumed) == 2 * B, "no burst: the lead is what it was"
    assert [a.prompt.group_id for a in resumed] == [2, 3, 4, 5]
    assert {a.ticket.version for a in resumed} == {1}
    counts = other.counters().tickets
    assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
    assert counts["committed"] == B


def test_without_dynamic_sampling_every_group_is_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0)
    assert [finish(flow, a, verdicts) for a, verdicts in zip(flow.admit(9), (RIGHT, WRONG), strict=True)] == [True] * 2
    assert flow.take() is not None and flow.publish() == 1
    assert flow.counters().refund_reasons == {} and flow.state_dict().keys() == {"stream", "buffer"}


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
    assert (counters.rejected_responses, counters.rejected_tokens) == (4, 8)


def test_value_pretraining_takes_every_group_and_no_policy_batch_inherits_one(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """L = 1: the second batch is finished before the first, value pretraining's only one, is trained on."""
    flow = make_flow(tokenizer, 1, 1, sampling=DynamicSampling(patience=9, exempt=1 * B))
    taken = [finish(flow, assignment, WRONG) for assignment in flow.admit(9)]
    assert taken == [True, True, False, False]
    assert flow.take() is not None and flow.publish() == 1
    assert flow.take() is None


def test_patience_ends_in_take_and_leaves_a_state_that_goes_on(tokenizer: PreTrainedTokenizerBase) -> None:
    flow = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=3))
    for _ in range(3):
        assert flow.take() is None
        (assignment, *_) = flow.admit(1)
        finish(flow, assignment, WRONG)
    with pytest.raises(RunError, match="refused 3 groups in a row, 0 all right and 3 all wrong"):
        flow.take()
    other = make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=3))
    other.load_state_dict(json.loads(json.dumps(flow.state_dict())))
    assert other.take() is None
    assert [a.prompt.group_id for a in other.admit(9)] == [3, 4], "refused prompts are behind us"
    assert other.counters().refund_reasons == {"all right": 0, "all wrong": 3}


def test_a_resumed_run_has_its_whole_patience(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whatever the row was when the checkpoint was written: else it would end at once, again and again."""

    def new_flow() -> Flow:
        return make_flow(tokenizer, 0, 0, sampling=DynamicSampling(patience=2))

    flow = new_flow()
    for verdicts in (WRONG, MIXED, RIGHT, WRONG):
        finish(flow, flow.admit(1)[0], verdicts)
    resumed = new_flow()
    resumed.load_state_dict(json.loads(json.dumps(flow.state_dict())))
    with pytest.raises(RunError, match="2 groups in a row, 1 all right and 1 all wrong"):
        flow.take()
    finish(resumed, resumed.admit(1)[0], WRONG)
    assert resumed.take() is None
    finish(resumed, resumed.admit(1)[0], WRONG)
    with pytest.raises(RunError, match="2 all wrong"):
        resumed.take()


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
