"""Tickets and prompts together: nothing is lost by a refund or a checkpoint."""

from transformers import PreTrainedTokenizerBase

from vapo_async.buffer import RolloutBuffer
from vapo_async.config import ChainSumTaskConfig
from vapo_async.flow import Assignment, Flow
from vapo_async.prompts.stream import PromptStream
from vapo_async.prompts.tasks import build_task
from vapo_async.schema import FinishReason, Response, Score, make_trajectory, set_score, stack_group

B, G = 2, 2
TASK = ChainSumTaskConfig(train_problems=50, heldout_problems=4)


def make_flow(tokenizer: PreTrainedTokenizerBase, max_staleness: int = 2, lead: int = 1) -> Flow:
    stream = PromptStream(build_task(TASK, 0), tokenizer, TASK, 0)
    return Flow(stream, RolloutBuffer(B, G, max_staleness, lead))


def finish(flow: Flow, assignment: Assignment) -> None:
    """Commits a made-up group sampled by the weights of the ticket's admission."""
    ticket = assignment.ticket
    trajectories = [
        make_trajectory(
            assignment.prompt, ticket, Response(i, [3, 1], [-1.0, -1.0], [ticket.version] * 2, FinishReason.STOP)
        )
        for i in range(G)
    ]
    for trajectory in trajectories:
        set_score(trajectory, Score(True, 1.0))
    flow.commit(ticket.ticket_id, stack_group(trajectories))


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
    assert flow.ticket_counts() == {"charged": 4, "committed": 0, "refunded": 1, "outstanding": 3}


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
    counts = other.ticket_counts()
    assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
    assert counts["committed"] == B
