"""Which groups are refused, and when that has gone on for too long."""

import pytest
from tensordict import LazyStackedTensorDict

from vapo_async import schema
from vapo_async.buffer import ALL_RIGHT, ALL_WRONG, DynamicSampling, RolloutBuffer, TicketError
from vapo_async.buffer.dynamic_sampling import rejection_reason
from vapo_async.config import RunError
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Score, Ticket


def make_group(verdicts: list[bool], ticket: Ticket | None = None) -> LazyStackedTensorDict:
    """Response i has i + 1 tokens; rewards differ by length even where the verdicts agree."""
    prompt = Prompt(0, Problem(0, "1+1", "2"), "1+1", (5, 6, 7))
    trajectories = []
    for i, correct in enumerate(verdicts):
        response = Response(i, [3] * (i + 1), [-0.5] * (i + 1), [0] * (i + 1), FinishReason.STOP)
        trajectories.append(schema.make_trajectory(prompt, ticket or Ticket(0, 0), response))
        schema.set_score(trajectories[-1], Score(correct, (1.0 if correct else -1.0) - 0.1 * i))
    return schema.stack_group(trajectories)


@pytest.mark.parametrize(
    ("verdicts", "reason"),
    [
        ([True, True, True], ALL_RIGHT),
        ([False, False, False], ALL_WRONG),
        ([False, True, False], None),
        ([True, True, False], None),
        ([True], ALL_RIGHT),
    ],
)
def test_the_verdict_decides_and_not_the_shaped_reward(verdicts: list[bool], reason: str | None) -> None:
    assert rejection_reason(make_group(verdicts)) == reason


def test_groups_for_value_pretraining_are_not_judged() -> None:
    sampling, wrong = DynamicSampling(patience=1, exempt=6), make_group([False] * 2)
    assert [sampling.judge(wrong, committed) for committed in (0, 5, 6, 7)] == [None, None, ALL_WRONG, ALL_WRONG]


def test_patience_counts_groups_in_a_row() -> None:
    sampling = DynamicSampling(patience=3)
    right, wrong, mixed = make_group([True] * 3), make_group([False] * 3), make_group([True, False, True])
    for group in (wrong, right, mixed, wrong, wrong):
        sampling.count(rejection_reason(group))
        sampling.check_patience()
    assert sampling.in_a_row == 2, "the mixed one ended the row"
    sampling.count(ALL_RIGHT)
    with pytest.raises(RunError) as caught:
        sampling.check_patience()
    assert str(caught.value) == (
        "dynamic sampling refused 3 groups in a row, 1 all right and 2 all wrong: train on easier problems, raise "
        "algorithm.group_size or algorithm.dynamic_sampling_patience, or set algorithm.dynamic_sampling=false"
    )
    sampling.check_patience()
    assert sampling.in_a_row == 0, "told once"


def test_all_right_asks_for_harder_problems() -> None:
    sampling = DynamicSampling(patience=1)
    sampling.count(ALL_RIGHT)
    with pytest.raises(RunError, match="1 groups in a row, 1 all right and 0 all wrong: train on harder problems"):
        sampling.check_patience()


@pytest.mark.parametrize(("patience", "exempt"), [(0, 0), (1, -1)])
def test_numbers_that_make_no_sense(patience: int, exempt: int) -> None:
    with pytest.raises(ValueError, match=f"patience={patience}, exempt={exempt}"):
        DynamicSampling(patience, exempt)


def test_a_rejected_group_is_checked_and_its_ticket_ends_once() -> None:
    buffer = RolloutBuffer(1, 2, max_staleness=0, lead=0)
    ticket = buffer.admit()
    assert ticket is not None and buffer.admit() is None
    with pytest.raises(ValueError, match="holds 3 trajectories, group_size=2"):
        buffer.reject(0, make_group([True] * 3), ALL_RIGHT)
    assert buffer.outstanding == 1
    buffer.reject(0, make_group([True] * 2), ALL_RIGHT)
    with pytest.raises(TicketError, match="already ended"):
        buffer.reject(0, make_group([True] * 2), ALL_RIGHT)
    assert buffer.ticket_counts() == {"charged": 1, "committed": 0, "refunded": 1, "outstanding": 0}
    assert buffer.refund_reasons == {ALL_RIGHT: 1} and buffer.committed == 0
    assert buffer.admit() == Ticket(1, 0), "its place is free at once"
