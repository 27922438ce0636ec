"""The staleness arithmetic against hand-made queues."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.buffer import StalenessBudget, choose_batch
from vapo_async.buffer.budget import in_time, late
from vapo_async.config import ConfigError


@pytest.mark.parametrize(("bound", "lead"), [(0, 1), (2, 3), (2, -1), (-1, 0)])
def test_lead_above_the_bound_is_refused(bound: int, lead: int) -> None:
    with pytest.raises(ValueError, match="0 <= lead <= max_staleness"):
        StalenessBudget(8, bound, lead)


def test_admission_spends_the_lead() -> None:
    budget = StalenessBudget(groups_per_batch=8, max_staleness=8, lead=2)
    assert [budget.charge() for _ in range(25)] == [*range(24), None]
    budget.refund()
    assert [budget.charge(), budget.charge()] == [24, None], "a refund gives one place and a new id"
    assert budget.publish() == 1
    assert [budget.charge() for _ in range(9)] == [*range(25, 33), None]


def test_synchronous_admits_one_batch_per_version() -> None:
    budget = StalenessBudget(4, 0, 0)
    for version in range(3):
        assert sum(budget.charge() is not None for _ in range(10)) == 4
        assert budget.publish() == version + 1


def test_takes_the_oldest_finished_while_there_is_slack() -> None:
    queue = [(0, False), (0, True), (0, False), (0, True), (0, True)]
    assert choose_batch(queue, 2, 4, 0).positions == [1, 3]


def test_waits_for_the_ticket_that_would_miss_its_deadline() -> None:
    queue = [(0, False), (3, True), (3, True)]
    assert choose_batch(queue, 2, 4, 3).positions == [1, 2], "position 0: 3 + 1 + 0 - 0 = 4 <= 4"
    assert choose_batch(queue, 2, 3, 3) == (None, 0), "4 > 3"


def test_position_of_an_overtaken_ticket_counts() -> None:
    queue = [(1, False), (1, False), (0, False), (1, True), (1, True)]  # the third would be served one version later
    assert choose_batch(queue, 2, 2, 0).positions == [3, 4], "0 + 1 + 2 // 2 - 0 = 2 <= 2"
    assert choose_batch(queue, 2, 1, 0) == (None, 2)


def test_too_few_finished() -> None:
    assert choose_batch([(0, True), (0, False)], 2, 8, 0) == (None, None)
    assert choose_batch([], 1, 0, 0) == (None, None)


def _rule_in_words(queue: list[tuple[int, bool]], b: int, s: int, published: int) -> list[int] | None:
    """docs/staleness.md, written down as it is read."""
    chosen = [i for i, (_, finished) in enumerate(queue) if finished][:b]
    rest = [version for i, (version, _) in enumerate(queue) if i not in chosen]
    in_time = all(published + 1 + i // b - version <= s for i, version in enumerate(rest))
    return chosen if len(chosen) == b and in_time else None


def test_equals_the_rule_in_words_and_no_other_choice_helps() -> None:
    for b, s, published in itertools.product((1, 2), (0, 1, 2), (1, 2)):
        for versions in itertools.combinations_with_replacement(range(published + 1), 4):
            if any(published + i // b - m > s for i, m in enumerate(versions)):
                continue  # a queue that is late already cannot come about
            for finished in itertools.product((False, True), repeat=4):
                queue = list(zip(versions, finished, strict=True))
                got, waits_for = choose_batch(queue, b, s, published)
                done = [i for i, f in enumerate(finished) if f]
                if len(done) >= b:
                    assert got == _rule_in_words(queue, b, s, published)
                assert waits_for is None or not finished[waits_for], "only an unfinished ticket is ever waited for"
                for other in itertools.combinations(done, b):
                    rest = [m for i, m in enumerate(versions) if i not in other]
                    if all(published + 1 + i // b - m <= s for i, m in enumerate(rest)):
                        assert got is not None


def test_looks_no_further_than_the_last_ticket_taken() -> None:
    read = []

    def queue() -> Iterator[tuple[int, bool]]:
        for position in itertools.count():
            read.append(position)
            yield 0, position != 1

    assert choose_batch(queue(), 3, 4, 0).positions == [0, 2, 3]
    assert read == [0, 1, 2, 3], "an endless queue"


@pytest.mark.parametrize(
    ("versions", "b", "s", "published", "expected"),
    [
        ([0, 0, 1, 1], 2, 2, 1, []),
        ([0, 0, 1, 1], 2, 1, 1, []),  # 1 + 0 - 0 and 1 + 1 - 1
        ([0, 0, 1, 1], 2, 0, 1, [0, 1]),  # too old wherever they stand; the others move forward and are in time
        ([0, 1, 1, 1], 1, 1, 1, [2, 3]),  # 1 + 2 - 1 = 2 > 1, again and again
        ([2, 2, 2, 2], 1, 1, 2, [2, 3]),
    ],
)
def test_late(versions: list[int], b: int, s: int, published: int, expected: list[int]) -> None:
    assert late(versions, b, s, published) == expected


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 3), st.integers(0, 4), st.integers(5, 7))
def test_without_those_who_are_late_the_queue_is_in_time(versions: list[int], b: int, s: int, published: int) -> None:
    queue = sorted(versions)
    gone = late(queue, b, s, published)
    rest = [version for index, version in enumerate(queue) if index not in gone]
    assert all(published + i // b - m <= s for i, m in enumerate(rest))
    assert late(rest, b, s, published) == []


@pytest.mark.parametrize(("capacity", "places"), [(None, 6), (2, 2), (5, 5), (99, 6)])
def test_capacity_and_lead_both_limit_admission(capacity: int | None, places: int) -> None:
    budget = StalenessBudget(2, 4, 2, capacity)
    assert sum(budget.charge() is not None for _ in range(20)) == budget.places == places
    budget.refund()
    assert [budget.charge(), budget.charge()] == [places, None]
    budget.publish()
    assert sum(budget.charge() is not None for _ in range(20)) == 2


def test_capacity_below_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity >= groups_per_batch does not hold: capacity=1, groups_per_batch=2"):
        StalenessBudget(2, 4, 2, 1)


def test_in_time() -> None:
    """published + 1 + ⌊i / B⌋ − m ≤ S: 3 + 1 + 0 − 2 = 2 at position 7, one more at position 8."""
    assert in_time(7, version=2, groups_per_batch=8, max_staleness=2, published=3)
    assert not in_time(8, version=2, groups_per_batch=8, max_staleness=2, published=3)


def test_state_round_trip_and_its_checks() -> None:
    budget = StalenessBudget(2, 4, 1, charged=7, refunded=3, published=2)
    state = budget.state_dict()
    assert all(type(value) is int for value in state.values())
    fresh = StalenessBudget(2, 3, 0)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    assert [fresh.charge() for _ in range(3)] == [7, 8, None], "ids go on; one batch, no burst"
    held = StalenessBudget(2, 3, 1)
    held.load_state_dict({**state, "charged": 10}, queued=3)
    assert [held.charge() for _ in range(2)] == [10, None], "three places of four are taken"
    lower = StalenessBudget(2, 3, 0)
    lower.load_state_dict({**state, "charged": 10}, queued=3)
    assert lower.charge() is None
    with pytest.raises(ConfigError, match=r"algorithm\.groups_per_batch=2, this run has 4: resume with .*=2"):
        StalenessBudget(4, 4, 1).load_state_dict(state)
    with pytest.raises(ValueError, match="5 != 4"):
        StalenessBudget(2, 4, 1).load_state_dict({**state, "charged": 8})
    with pytest.raises(ValueError, match="4 != 5"):
        StalenessBudget(2, 4, 1).load_state_dict(state, queued=1)
