"""Responses in parts travel exactly."""

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vapo_async.responses import pack_by_ticket, unpack_by_ticket
from vapo_async.schema import FinishReason, Response
from vapo_async.state import read_state, write_state

responses = st.builds(
    lambda sample, tokens, reason: Response(
        sample, [t for t, _, _ in tokens], [p for _, p, _ in tokens], [v for _, _, v in tokens], reason
    ),
    st.integers(0, 3),
    st.lists(
        st.tuples(
            st.integers(0, 2**40), st.floats(max_value=0.0, allow_nan=False, width=32), st.integers(0, 2**31 - 1)
        ),
        max_size=4,
    ),
    st.sampled_from(FinishReason),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 2**40), st.lists(responses, min_size=1, max_size=3), max_size=3))
def test_responses_come_back_exactly(tmp_path: Path, carried: dict[int, list[Response]]) -> None:
    write_state(pack_by_ticket(carried), tmp_path, "carried")
    assert unpack_by_ticket(read_state(tmp_path, "carried")) == {k: tuple(v) for k, v in carried.items()}
