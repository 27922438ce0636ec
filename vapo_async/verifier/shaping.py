"""From a verdict and a length to a reward: pure arithmetic."""


def overlong_penalty(length_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's soft overlong punishment (2503.14476, eq. 13), in [−1, 0]; ``cache_tokens`` = 0 switches it off.

    0 while l ≤ L_max − L_cache; ((L_max − L_cache) − l) / L_cache up to L_max; −1 beyond.
    """
    if cache_tokens < 0 or cache_tokens > max_tokens:
        raise ValueError(f"cache_tokens is {cache_tokens}, expected 0 … max_tokens ({max_tokens})")
    excess = length_tokens - (max_tokens - cache_tokens)
    if cache_tokens == 0 or excess <= 0:
        return 0.0
    return max(-1.0, -excess / cache_tokens)


def shaped_reward(
    correct: bool,
    length_tokens: int,
    *,
    reward_correct: float,
    reward_wrong: float,
    max_response_tokens: int,
    overlong_cache_tokens: int,
) -> float:
    """The verdict's reward plus the overlong penalty. ``length_tokens`` counts generated tokens, the end included."""
    base = reward_correct if correct else reward_wrong
    return base + overlong_penalty(length_tokens, max_response_tokens, overlong_cache_tokens)
