"""Row lengths as long answers have them."""

import math
import random


def long_tailed(count: int, seed: int, median: float = 1280, sigma: float = 1.27) -> list[int]:
    """Log-normal between 100 and 16,384 tokens, drawn again outside; by default both ends are two σ from the median."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while len(lengths) < count:
        length = round(generator.lognormvariate(math.log(median), sigma))
        if 100 <= length <= 16_384:
            lengths.append(length)
    return lengths
