"""A Transformers KV cache with one row per response in flight: rows are written, moved and refilled independently."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, kv_heads, max_length, head_dim]."""

    def __init__(self, rows: int, max_length: int) -> None:
        super().__init__()
        self._rows, self._max_length = rows, max_length
        self.target_rows: Tensor | None = None  # [n] rows of a prefill; None: decode rows 0 … n-1
        self.write_at: Tensor | None = None  # [n] position of the decoded token
        self.read_length = 0  # positions that attention sees in a decode step

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, like in (("keys", key_states), ("values", value_states)):
            shape = (self._rows, like.shape[1], self._max_length, like.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Prefill: stores [n, heads, P, dim] at the start of ``target_rows``. Decode: one position a row."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        n, _, length, _ = key_states.shape
        if self.target_rows is not None:
            repeats = len(self.target_rows) // n  # a prompt is computed once and stored for its samples
            self.keys[self.target_rows, :, :length] = key_states.repeat_interleave(repeats, 0)
            self.values[self.target_rows, :, :length] = value_states.repeat_interleave(repeats, 0)
            return key_states, value_states
        rows = torch.arange(n, device=key_states.device)
        self.keys[rows, :, self.write_at] = key_states[:, :, 0]
        self.values[rows, :, self.write_at] = value_states[:, :, 0]
        return self.keys[:n, :, : self.read_length], self.values[:n, :, : self.read_length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` positions of a row over another."""
        assert self.keys is not None and self.values is not None
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.read_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given explicitly

    def get_max_length(self) -> int:
        return self._max_length


class SlotCache(Cache):
    """One :class:`SlotLayer` per layer, steered together."""

    def __init__(self, num_layers: int, rows: int, max_length: int) -> None:
        self.slots = [SlotLayer(rows, max_length) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))

    def prefill_into(self, rows: Tensor) -> None:
        for layer in self.slots:
            layer.target_rows = rows

    def decode_at(self, positions: Tensor, read_length: int) -> None:
        for layer in self.slots:
            layer.target_rows, layer.write_at, layer.read_length = None, positions, read_length

    def move(self, source: int, target: int, length: int) -> None:
        for layer in self.slots:
            layer.move(source, target, length)

    def state_dict(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """The first ``lengths[i]`` positions of row i: ``keys.<layer>`` and ``values.<layer>``, on the CPU.

        Each is [sum(lengths), kv_heads, head_dim]. A position costs 2 · layers · kv_heads · head_dim numbers of the
        model's dtype. Nothing is kept for no row.
        """
        if not lengths:
            return {}
        tensors = {}
        for i, layer in enumerate(self.slots):
            for name, stored in (("keys", layer.keys), ("values", layer.values)):
                assert stored is not None, "a response in flight has keys"
                rows = [stored[row, :, :length].transpose(0, 1).cpu() for row, length in enumerate(lengths)]
                tensors[f"{name}.{i}"] = torch.cat(rows)
        return tensors

    def load_state_dict(
        self, tensors: Mapping[str, Tensor], lengths: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """What :meth:`state_dict` gave, into rows 0 …; rows past the cache's own are left out."""
        for i, layer in enumerate(self.slots if lengths else ()):
            keys, values = (tensors[f"{name}.{i}"].to(device, dtype) for name in ("keys", "values"))
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None].transpose(1, 2), values[None].transpose(1, 2))
            for stored, loaded in ((layer.keys, keys), (layer.values, values)):
                assert stored is not None
                for row, part in enumerate(loaded.split(list(lengths))[: len(stored)]):
                    stored[row, :, : len(part)] = part.transpose(0, 1)
