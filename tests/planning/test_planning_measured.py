"""The memory model against measured peaks of the real learner, each in a process of its own."""

import pytest
from plan_memory import BOUND, Case, row_of


@pytest.mark.parametrize(
    "case",
    [
        Case("tiny", 256),  # activations
        Case("smollm2", 16, layers=1),  # both gradients of a large tied embedding
    ],
    ids=lambda case: case.model,
)
def test_the_model_is_within_15_per_cent_of_the_measurement(case: Case) -> None:
    assert row_of(case).ratio == pytest.approx(1, abs=BOUND)
