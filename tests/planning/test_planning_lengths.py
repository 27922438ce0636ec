"""Moments of cut log-normal lengths against draws of the simulation's sampler."""

import random
from math import exp
from statistics import NormalDist, fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.planning.lengths import LARGEST_MEDIAN, LARGEST_SIGMA, ResponseLengths
from vapo_async.simulation.cluster import Lengths
from vapo_async.simulation.lengths import sampler


@pytest.mark.parametrize(
    ("median", "sigma", "limit"), [(4096, 0.8, 20_480), (1000, 1.5, 2000), (200, 0.3, 150), (500, 1.0, 10**6)]
)
def test_moments_are_those_of_what_is_simulated(median: float, sigma: float, limit: int) -> None:
    lengths = ResponseLengths(median, sigma, limit, prompt_tokens=200)
    simulated = Lengths(median_tokens=median, sigma=sigma, max_tokens=limit)
    draw = sampler(simulated, random.Random(0))
    drawn = [draw() for _ in range(100_000)]
    assert lengths.mean == pytest.approx(fmean(drawn), rel=0.02)
    assert lengths.moment(2) == pytest.approx(fmean(n**2 for n in drawn), rel=0.05)
    assert lengths.mean_sequence == pytest.approx(200 + lengths.mean)
    assert lengths.mean_square_sequence == pytest.approx(fmean((200 + n) ** 2 for n in drawn), rel=0.05)


def test_equal_lengths_have_no_spread() -> None:
    lengths = ResponseLengths(100, 0.0, 1000, prompt_tokens=20)
    assert (lengths.mean, lengths.moment(2), lengths.mean_context) == (100, 10_000, 70)
    assert ResponseLengths(100, 0.0, 80, prompt_tokens=0).mean == 80


def test_a_response_in_flight_is_met_by_its_length() -> None:
    """Of lengths 1 and 3 at random moments, three in four are within the long one: (1·½ + 3·1½) / 4 behind them."""
    lengths = ResponseLengths(1000, 1.0, 8000, prompt_tokens=0)
    draw = sampler(Lengths(median_tokens=1000, sigma=1.0, max_tokens=8000), random.Random(1))
    drawn = [draw() for _ in range(100_000)]
    assert lengths.mean_context == pytest.approx(sum(n * n / 2 for n in drawn) / sum(drawn), rel=0.03)


@pytest.mark.parametrize(("median", "sigma", "limit"), [(1, 5.0, 20_480), (1e9, 5.0, 20_480), (4096, 3.0, 20_480)])
def test_wide_spreads_keep_their_tails(median: float, sigma: float, limit: int) -> None:
    """Against sums over the quantiles of the normal distribution."""
    lengths = ResponseLengths(median, sigma, limit, prompt_tokens=0)
    normal, steps = NormalDist(), 100_000
    drawn = [min(limit, median * exp(sigma * normal.inv_cdf((i + 0.5) / steps))) for i in range(steps)]
    assert lengths.mean == pytest.approx(fmean(drawn), rel=1e-3)
    assert lengths.moment(2) == pytest.approx(fmean(n**2 for n in drawn), rel=1e-3)


@given(median=st.floats(1, LARGEST_MEDIAN), sigma=st.floats(0, LARGEST_SIGMA), limit=st.integers(1, 10**6))
def test_moments_are_finite_and_within_the_limit(median: float, sigma: float, limit: int) -> None:
    lengths = ResponseLengths(median, sigma, limit, prompt_tokens=0)
    assert 0 < lengths.mean <= limit * (1 + 1e-9)
    assert lengths.mean**2 * (1 - 1e-9) <= lengths.moment(2) <= limit * lengths.mean * (1 + 1e-9)


@pytest.mark.parametrize(
    ("median", "sigma", "told"),
    [
        (0, 1.0, r"^median_tokens must be above 0, at most 1e\+09, found 0$"),
        (1e300, 1.0, "^median_tokens must be above 0"),
        (float("nan"), 1.0, "^median_tokens must be above 0"),
        (100, 50.0, r"^sigma must be between 0 and 5, found 50\.0$"),
        (100, -1.0, "^sigma must be between 0 and 5"),
        (100, float("nan"), "^sigma must be between 0 and 5"),
    ],
)
def test_lengths_without_moments_are_refused(median: float, sigma: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ResponseLengths(median, sigma, 1000, prompt_tokens=0)
