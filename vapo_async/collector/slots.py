"""The responses in flight of the embedded engine: slots 0 … n−1, each a row of every tensor and of the KV cache."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vapo_async.collector.samples import Sample
from vapo_async.collector.slot_cache import SlotCache
from vapo_async.schema import FinishReason, Response


class Slots:
    """Slots in flight are always the first ones: a freed slot is filled by the last.

    Args:
        layers: of the model.
        rows: most slots.
        max_length: tokens of prompt and response together.
        device: of the model.
    """

    def __init__(self, layers: int, rows: int, max_length: int, device: torch.device) -> None:
        self.rows = rows
        self.in_flight: list[Sample] = []  # index = slot; a response here is what the slot began with
        self.cache = SlotCache(layers, rows, max_length)
        self.tokens = torch.zeros(rows, max_length, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(rows, max_length, dtype=torch.float32, device=device)
        self.versions = torch.zeros(rows, max_length, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens so far
        self.limits = torch.zeros(rows, dtype=torch.int64, device=device)  # prompt + max_new_tokens

    def __len__(self) -> int:
        return len(self.in_flight)

    def fill(self, sample: Sample) -> int:
        """Puts a sample into the next free slot, without its keys and values; returns the slot."""
        slot, response, device = len(self.in_flight), sample.response, self.tokens.device
        self.in_flight.append(sample)
        prompt = sample.request.prompt_token_ids
        tokens = torch.tensor([*prompt, *response.token_ids], dtype=torch.int64, device=device)
        self.tokens[slot, : len(tokens)] = tokens
        if response.token_ids:
            span = slice(len(prompt), len(tokens))
            self.log_probs[slot, span] = torch.tensor(response.log_probs, dtype=torch.float32, device=device)
            self.versions[slot, span] = torch.tensor(response.versions, dtype=torch.int32, device=device)
        self.lengths[slot], self.limits[slot] = len(tokens), sample.limit
        return slot

    def append(self, sampled: Tensor, log_probs: Tensor, version: int) -> Tensor:
        """One token for every slot in flight, [n] each. Returns which have reached their limit, [n] bool."""
        n = len(self.in_flight)
        rows, at = torch.arange(n, device=sampled.device), self.lengths[:n]
        self.tokens[rows, at] = sampled
        self.log_probs[rows, at] = log_probs
        self.versions[rows, at] = version
        self.lengths[:n] += 1
        return self.lengths[:n] >= self.limits[:n]

    def tokens_of(self, slot: int) -> Tensor:
        """Prompt and response so far, [length] int64."""
        return self.tokens[slot, : int(self.lengths[slot])]

    def response(self, slot: int, reason: FinishReason) -> Response:
        """A copy of what a slot has generated."""
        sample = self.in_flight[slot]
        span = slice(len(sample.request.prompt_token_ids), int(self.lengths[slot]))
        return Response(
            sample.response.sample_index,
            self.tokens[slot, span].tolist(),
            self.log_probs[slot, span].tolist(),
            self.versions[slot, span].tolist(),
            reason,
        )

    def sample(self, slot: int) -> Sample:
        """A slot as a sample that could wait: unfinished, with all its tokens."""
        return replace(self.in_flight[slot], response=self.response(slot, FinishReason.ABORTED))

    def release(self, slots: Sequence[int]) -> None:
        """Frees slots: the last slot in flight moves into each hole."""
        for slot in sorted(slots, reverse=True):
            last = len(self.in_flight) - 1
            if slot != last:
                length = int(self.lengths[last])
                self.cache.move(last, slot, length)
                for buffer in (self.tokens, self.log_probs, self.versions):
                    buffer[slot, :length] = buffer[last, :length]
                self.lengths[slot], self.limits[slot] = self.lengths[last], self.limits[last]
                self.in_flight[slot] = self.in_flight[last]
            self.in_flight.pop()
