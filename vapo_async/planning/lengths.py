"""How long responses are: log-normal, cut by the limit, as in the simulation."""

import math
from dataclasses import dataclass
from typing import Final

LARGEST_MEDIAN: Final = 1e9
LARGEST_SIGMA: Final = 5.0
"""Beyond that nothing is left between no length and the limit."""


@dataclass(frozen=True)
class ResponseLengths:
    """Tokens of a response and of its prompt.

    Raises:
        ValueError: a median above 1e9 or not above 0, or a σ that is not between 0 and 5.
    """

    median_tokens: float
    sigma: float
    """Standard deviation of the logarithm."""
    max_tokens: int
    """The limit, which cuts."""
    prompt_tokens: float

    def __post_init__(self) -> None:
        if not 0 < self.median_tokens <= LARGEST_MEDIAN:
            raise ValueError(f"median_tokens must be above 0, at most {LARGEST_MEDIAN:g}, found {self.median_tokens}")
        if not 0 <= self.sigma <= LARGEST_SIGMA:
            raise ValueError(f"sigma must be between 0 and {LARGEST_SIGMA:g}, found {self.sigma}")

    def moment(self, k: int) -> float:
        """E[min(l, limit)^k] of a response's length l."""
        limit, median, sigma = self.max_tokens, self.median_tokens, self.sigma
        if sigma == 0:
            return float(min(limit, median) ** k)
        z = math.log(limit / median) / sigma
        below = median**k * math.exp((k * sigma) ** 2 / 2) * _normal_cdf(z - k * sigma)
        return float(below + limit**k * _normal_cdf(-z))

    @property
    def mean(self) -> float:
        """Tokens of a response."""
        return self.moment(1)

    @property
    def mean_sequence(self) -> float:
        """Tokens of prompt and response."""
        return self.prompt_tokens + self.mean

    @property
    def mean_square_sequence(self) -> float:
        """E[(prompt + response)²]."""
        return self.prompt_tokens**2 + 2 * self.prompt_tokens * self.mean + self.moment(2)

    @property
    def mean_context(self) -> float:
        """Tokens that a response in flight has behind it at a random moment: long ones are met more often."""
        return self.prompt_tokens + self.moment(2) / (2 * self.mean)


def _normal_cdf(z: float) -> float:
    """``statistics.NormalDist`` loses the tail that a large σ looks at."""
    return math.erfc(-z / math.sqrt(2)) / 2
