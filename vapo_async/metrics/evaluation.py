"""avg@k, pass@k and their uncertainty: pure functions of which responses were correct."""

import math
from collections.abc import Sequence

Correct = Sequence[Sequence[bool]]  # [problems][k]


def avg_at_k(correct: Correct) -> float:
    """Mean over the problems of the share of correct responses."""
    _check(correct)
    return sum(sum(row) / len(row) for row in correct) / len(correct)


def avg_at_k_stderr(correct: Correct) -> float:
    """Standard error of :func:`avg_at_k`, clustered over problems: s / sqrt(P).

    Responses to one problem are alike, so the problem is the unit that is drawn; s is the standard deviation
    (P − 1 in the denominator) of the problems' shares. NaN for a single problem, which says nothing about others.
    """
    _check(correct)
    if len(correct) < 2:
        return math.nan
    shares = [sum(row) / len(row) for row in correct]
    mean = sum(shares) / len(shares)
    variance = sum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
    return math.sqrt(variance / len(shares))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k responses is correct, from c correct ones among n.

    1 − C(n − c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 ≤ c ≤ n and 1 ≤ k ≤ n, found n={n}, c={c}, k={k}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_pass_at_k(correct: Correct, k: int) -> float:
    """:func:`pass_at_k` averaged over the problems."""
    _check(correct)
    return sum(pass_at_k(len(row), sum(row), k) for row in correct) / len(correct)


def _check(correct: Correct) -> None:
    if not correct or any(len(row) == 0 for row in correct):
        raise ValueError("an evaluation needs at least one problem and one response to each")
