"""Fills rows of a slot cache with the keys and values of whole sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vapo_async.collector.slot_cache import SlotCache

_PREFILL_TOKENS = 16_384  # padded tokens of one prefill pass


def prefill(decoder: nn.Module, cache: SlotCache, fills: Sequence[tuple[list[int], Tensor]]) -> None:
    """Stores keys and values of all tokens but the last (the next decode step feeds that one).

    Args:
        decoder: the model without its head.
        cache: where to.
        fills: rows that hold the same tokens, and those tokens [L] int64, L ≥ 1. Similar lengths beside each other
            waste the least padding.
    """
    pending = [(rows, tokens[:-1]) for rows, tokens in fills if len(tokens) > 1]
    while pending:
        width = max(len(tokens) for _, tokens in pending)
        many = max(1, _PREFILL_TOKENS // width)
        repeats = len(pending[0][0])
        chunk = [f for f in pending[:many] if len(f[0]) == repeats]
        pending = [f for f in pending if not any(f is c for c in chunk)]
        device = chunk[0][1].device
        inputs = torch.zeros(len(chunk), max(len(t) for _, t in chunk), dtype=torch.int64, device=device)
        for i, (_, tokens) in enumerate(chunk):
            inputs[i, : len(tokens)] = tokens  # right padding: causal attention never looks at it
        cache.prefill_into(torch.tensor([row for rows, _ in chunk for row in rows], device=device))
        positions = torch.arange(inputs.shape[1], device=device)[None, :]
        causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=device).tril()
        decoder(
            input_ids=inputs,
            position_ids=positions,
            attention_mask=causal[None, None],
            past_key_values=cache,
            use_cache=True,
        )
