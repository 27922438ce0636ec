"""Moments of cut log-normal lengths against draws of the simulation's sampler."""

import random
from statistics import fmean

import pytest

from vapo_async.planning.lengths import ResponseLengths
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
