"""Where the lengths of responses come from."""

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from itertools import accumulate

from vapo_async.simulation.cluster import Lengths


def sampler(lengths: Lengths, generator: random.Random) -> Callable[[], int]:
    """Draws the tokens of one response, at least 1."""
    limit = math.inf if lengths.max_tokens is None else lengths.max_tokens
    draw = _from_histogram(lengths.histogram, generator) if lengths.histogram else _log_normal(lengths, generator)
    return lambda: max(1, math.ceil(min(draw(), limit)))


def mean_length(lengths: Lengths, draws: int = 100_000) -> float:
    """Tokens of a response on average, by drawing."""
    draw = sampler(lengths, random.Random(0))
    return sum(draw() for _ in range(draws)) / draws


def _log_normal(lengths: Lengths, generator: random.Random) -> Callable[[], float]:
    assert lengths.median_tokens is not None
    median, sigma = lengths.median_tokens, lengths.sigma
    if sigma == 0:
        return lambda: median
    return lambda: median * math.exp(generator.gauss(0.0, sigma))


def _from_histogram(histogram: dict[int, float], generator: random.Random) -> Callable[[], float]:
    bounds, sums = list(histogram), list(accumulate(histogram.values()))

    def draw() -> float:
        place = bisect_left(sums, generator.random() * sums[-1])
        below = bounds[place - 1] if place else 0
        return below + 1 + int(generator.random() * (bounds[place] - below))

    return draw
