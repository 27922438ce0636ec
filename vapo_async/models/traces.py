"""Scratchpad traces that the embedded model is pretrained on: ``3-9+2:`` → ``3-9=-6;-6+2=-4;#-4$``.

A clean trace works a chain of one-digit sums and differences from left to right. Planted bad habits spoil some of
them: ``-`` worked as ``+``, a random slip in a step, an answer without steps. Reinforcement learning then has habits
to remove.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vapo_async.models.char_tokenizer import EOS, PAD, SYMBOLS

_ID_OF_BYTE = np.zeros(256, dtype=np.int64)
for _id, _symbol in enumerate(SYMBOLS):
    if len(_symbol) == 1:
        _ID_OF_BYTE[ord(_symbol)] = _id
_ID_OF_BYTE[0] = SYMBOLS.index(PAD)


@dataclass(frozen=True)
class Habits:
    """How often a trace goes wrong; all zero = clean."""

    sign_rate: float = 0.0
    """Share of problems in which ``-`` is worked as ``+``."""
    sign_step_rate: float = 1.0
    """Share of the ``-`` steps of such a problem that are worked as ``+``."""
    direct_rate: float = 0.0
    """Share of problems answered (rightly) without steps."""
    slip_rate: float = 0.0
    """Chance that a step's result is off by one to three."""


CLEAN = Habits()


@dataclass(frozen=True)
class TraceBatch:
    """N right-padded sequences; ``labels`` is −100 on the prompt and the padding."""

    input_ids: Tensor  # [N, L] int64
    labels: Tensor  # [N, L] int64


def make_traces(terms: int, count: int, habits: Habits, rng: np.random.Generator) -> list[tuple[str, str]]:
    """``count`` random chains of ``terms`` one-digit terms as (question, response), the end token included."""
    digits = rng.integers(0, 10, (count, terms))
    signs = rng.choice(np.array([-1, 1]), (count, terms - 1))
    results = _worked(digits, signs, habits, rng)
    direct = rng.random(count) < habits.direct_rate
    right = digits[:, 0] + (digits[:, 1:] * signs).sum(1)
    traces = []
    for digit, sign, result, is_direct, answer in zip(
        digits.tolist(), signs.tolist(), results.tolist(), direct.tolist(), right.tolist(), strict=True
    ):
        moves = [f"{'+' if s > 0 else '-'}{d}" for s, d in zip(sign, digit[1:], strict=True)]
        question = f"{digit[0]}{''.join(moves)}:"
        if is_direct:
            traces.append((question, f"#{answer}{EOS}"))
            continue
        lefts = [digit[0], *result[:-1]]
        steps = "".join(f"{left}{move}={out};" for left, move, out in zip(lefts, moves, result, strict=True))
        traces.append((question, f"{steps}#{result[-1] if result else digit[0]}{EOS}"))
    return traces


def _worked(
    digits: NDArray[np.int64], signs: NDArray[np.int64], habits: Habits, rng: np.random.Generator
) -> NDArray[np.int64]:
    """[N, terms − 1] results of the steps, each taken from the (possibly wrong) result before it."""
    count, steps = signs.shape
    habitual = rng.random((count, 1)) < habits.sign_rate
    as_plus = habitual & (rng.random((count, steps)) < habits.sign_step_rate)
    worked_signs = np.where(as_plus, 1, signs)
    size = rng.integers(1, 4, (count, steps)) * rng.choice(np.array([-1, 1]), (count, steps))
    slips = np.where(rng.random((count, steps)) < habits.slip_rate, size, 0)
    return digits[:, :1] + np.cumsum(digits[:, 1:] * worked_signs + slips, axis=1)


def encode_traces(traces: list[tuple[str, str]]) -> TraceBatch:
    """Token ids and labels of (question, response) pairs."""
    texts = [question + response for question, response in traces]
    length = max(map(len, texts))
    raw = np.frombuffer("".join(t.ljust(length, "\0") for t in texts).encode("ascii"), dtype=np.uint8)
    input_ids = torch.from_numpy(_ID_OF_BYTE[raw].reshape(len(texts), length))
    prompt = torch.tensor([len(question) for question, _ in traces])[:, None]
    end = torch.tensor([len(text) for text in texts])[:, None]
    position = torch.arange(length)
    labels = torch.where((position >= prompt) & (position < end), input_ids, -100)
    return TraceBatch(input_ids, labels)


def trace_batch(
    terms: int, count: int, habits: Habits, rng: np.random.Generator, exclude: Collection[str] = ()
) -> TraceBatch:
    """One batch of equally long chains; questions in ``exclude`` are left out (the batch is that much smaller)."""
    traces = make_traces(terms, count, habits, rng)
    kept = [trace for trace in traces if trace[0] not in exclude]
    return encode_traces(kept or traces[:1])
