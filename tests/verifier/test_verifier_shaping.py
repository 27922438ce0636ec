"""The overlong penalty and the shaped reward."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.verifier.shaping import overlong_penalty, shaped_reward


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_the_papers_numbers(length: int, penalty: float) -> None:
    assert overlong_penalty(length, max_tokens=20480, cache_tokens=4096) == penalty


@given(st.integers(1, 5000), st.data())
def test_monotone_and_bounded(max_tokens: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(0, max_tokens))
    short, long = sorted(data.draw(st.tuples(st.integers(0, 6000), st.integers(0, 6000))))
    a, b = overlong_penalty(short, max_tokens, cache), overlong_penalty(long, max_tokens, cache)
    assert -1.0 <= b <= a <= 0.0
    assert cache > 0 or b == 0.0


def test_a_cache_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_tokens is 9"):
        overlong_penalty(1, max_tokens=8, cache_tokens=9)


def test_shaped_reward() -> None:
    def reward(correct: bool, length: int) -> float:
        return shaped_reward(
            correct,
            length,
            reward_correct=1.0,
            reward_wrong=-1.0,
            max_response_tokens=100,
            overlong_cache_tokens=20,
        )

    assert reward(True, 80) == 1.0
    assert reward(True, 90) == 0.5
    assert reward(False, 100) == -2.0
