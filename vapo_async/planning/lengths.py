"""How long responses are: log-normal, cut by the limit, as in the simulation."""

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class ResponseLengths:
    """Tokens of a response and of its prompt."""

    median_tokens: float
    sigma: float
    """Standard deviation of the logarithm."""
    max_tokens: int
    """The limit, which cuts."""
    prompt_tokens: float

    def moment(self, k: int) -> float:
        """E[min(l, limit)^k] of a response's length l."""
        limit, median, sigma = self.max_tokens, self.median_tokens, self.sigma
        if sigma == 0:
            return float(min(limit, median) ** k)
        z, normal = math.log(limit / median) / sigma, NormalDist()
        below = median**k * math.exp((k * sigma) ** 2 / 2) * normal.cdf(z - k * sigma)
        return below + limit**k * (1 - normal.cdf(z))

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
