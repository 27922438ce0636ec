"""avg@k, pass@k and the clustered standard error against numbers worked by hand."""

import itertools
import math

import pytest

from vapo_async.metrics.evaluation import avg_at_k, avg_at_k_stderr, mean_pass_at_k, pass_at_k

ROWS = [[True, True], [True, False], [False, False], [False, False]]  # shares 1, 1/2, 0, 0


def test_metrics_avg_at_k_is_the_mean_of_the_shares() -> None:
    assert avg_at_k(ROWS) == pytest.approx(3 / 8)


def test_metrics_avg_at_k_weighs_problems_alike() -> None:
    assert avg_at_k([[True], [False, False, False]]) == pytest.approx(1 / 2)


def test_metrics_stderr_is_clustered_over_problems() -> None:
    # deviations 5/8, 1/8, -3/8, -3/8: squares 25 + 1 + 9 + 9 = 44 / 64; / 3 / 4
    assert avg_at_k_stderr(ROWS) == pytest.approx(math.sqrt(44 / 64 / 3 / 4))


def test_metrics_stderr_of_repeated_answers_does_not_shrink_with_k() -> None:
    few, many = [[True], [False], [True]], [[True] * 50, [False] * 50, [True] * 50]
    assert avg_at_k_stderr(many) == pytest.approx(avg_at_k_stderr(few))


def test_metrics_stderr_of_one_problem_is_unknown() -> None:
    assert math.isnan(avg_at_k_stderr([[True, False]]))


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 0, 2, 0.0), (4, 4, 1, 1.0), (4, 1, 1, 1 / 4), (4, 2, 2, 1 - 1 / 6), (4, 3, 2, 1.0), (10, 3, 5, 1 - 21 / 252)],
)
def test_metrics_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (7, 1, 4), (5, 5, 5)])
def test_metrics_pass_at_k_equals_counting_the_draws(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_metrics_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_metrics_mean_pass_at_k() -> None:
    assert mean_pass_at_k(ROWS, 1) == pytest.approx(avg_at_k(ROWS))
    assert mean_pass_at_k(ROWS, 2) == pytest.approx(2 / 4)


@pytest.mark.parametrize("rows", [[], [[True], []]])
def test_metrics_empty_evaluation_is_refused(rows: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match="at least one problem"):
        avg_at_k(rows)
