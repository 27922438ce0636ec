"""What is generated: prompts, lengths, and how much of it."""

import random
from dataclasses import dataclass
from typing import Final

LONGEST_PROMPT: Final = 24
UNIFORM, LONG_TAILED = "uniform", "long-tailed"
LENGTHS: Final = (UNIFORM, LONG_TAILED)
SIGMA: Final = 1.0
"""Of the logarithm of long-tailed lengths."""


@dataclass(frozen=True)
class Sizes:
    """How much is run with one model."""

    concurrency: tuple[int, ...]
    uniform_tokens: int
    """Of every response with uniform lengths."""
    median_tokens: int
    """Of long-tailed lengths."""
    longest_tokens: int
    """Long-tailed lengths are cut here."""
    repeats: int
    update_tokens: int
    """Of the responses in flight when weights are updated half-way: as many decode steps."""
    update_rounds: int
    """Updates of each kind that are measured."""
    requests_per_slot: int = 2

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt and response together."""
        return LONGEST_PROMPT + max(self.uniform_tokens, self.longest_tokens, self.update_tokens)


TINY: Final = Sizes((8, 32, 64, 128, 256), 48, 24, 128, repeats=3, update_tokens=100, update_rounds=5)
SMOLLM2: Final = Sizes((8, 16, 64), 16, 24, 96, repeats=2, update_tokens=32, update_rounds=2)
QUICK: Final = Sizes((4,), 8, 4, 16, repeats=1, update_tokens=8, update_rounds=1)


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to write for each."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """All that are to be written."""
        return sum(self.lengths)


def make_workload(lengths: str, concurrency: int, sizes: Sizes, seed: int = 0) -> Workload:
    """The same one for every engine. The prompts' tokens are in the vocabulary of every model here."""
    draw = random.Random(f"{seed}/{lengths}/{concurrency}")
    prompts = _prompts(draw, sizes.requests_per_slot * concurrency)
    if lengths == UNIFORM:
        return Workload(prompts, [sizes.uniform_tokens] * len(prompts))
    drawn = [sizes.median_tokens * draw.lognormvariate(0, SIGMA) for _ in prompts]
    return Workload(prompts, [min(max(round(length), 1), sizes.longest_tokens) for length in drawn])


def update_workload(concurrency: int, sizes: Sizes, seed: int = 0) -> Workload:
    """All of it in flight together; one response ends half-way, the others at the last decode step."""
    prompts = _prompts(random.Random(f"{seed}/update/{concurrency}"), concurrency)
    return Workload(prompts, [sizes.update_tokens // 2] + [sizes.update_tokens] * (concurrency - 1))


def _prompts(draw: random.Random, count: int) -> list[list[int]]:
    return [[draw.randrange(3, 18) for _ in range(draw.randint(4, LONGEST_PROMPT))] for _ in range(count)]
