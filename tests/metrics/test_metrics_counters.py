"""Ages and totals are counted right and survive JSON."""

import json

import pytest

from vapo_async.metrics.counters import AgeHistogram, RunTotals


def test_metrics_ages_by_hand() -> None:
    ages = AgeHistogram()
    assert (ages.mean, ages.max, ages.total, ages.counts) == (0.0, 0, 0, {})
    ages.add([0, 2, 2])
    ages.add([1])
    assert ages.counts == {0: 1, 1: 1, 2: 2}
    assert (ages.mean, ages.max, ages.total) == (5 / 4, 2, 4)


def test_metrics_negative_age_is_refused_and_leaves_no_trace() -> None:
    ages = AgeHistogram()
    with pytest.raises(ValueError, match="cannot be negative"):
        ages.add([1, -1])
    assert ages.total == 0


def test_metrics_totals_survive_json() -> None:
    totals = RunTotals(trained_tokens=7, optimizer_steps=3, versions=2, wall_s=1.5)
    totals.ages.add([0, 3, 3])
    restored = RunTotals()
    restored.load_state_dict(json.loads(json.dumps(totals.state_dict())))
    assert restored == totals
    restored.ages.add([3])
    assert restored.ages.counts == {0: 1, 3: 3} and totals.ages.counts == {0: 1, 3: 2}


def test_metrics_totals_refuse_a_state_that_does_not_fit() -> None:
    state = RunTotals().state_dict()
    del state["versions"]
    with pytest.raises(ValueError, match="versions missing or unknown"):
        RunTotals().load_state_dict(state)
