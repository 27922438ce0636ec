"""The embedded engine: continuous batching over any Transformers decoder with full attention, in this process.

It steps synchronously, which makes a seeded run reproducible; ``benchmarks/engines.py`` sets its speed beside
Transformers' own continuous batching and ``generate``.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.collector.slot_cache import SlotCache
from vapo_async.config import ConfigError, KVCacheOnUpdate
from vapo_async.schema import FinishReason, Response

_PREFILL_TOKENS = 16_384  # padded tokens of one prefill pass


@dataclass
class _Sequence:
    """A response that waits or is in flight."""

    request: GenerationRequest
    sample_index: int


class TransformersEngine:
    """Slots 0 … n−1 are always the responses in flight; a finished one is replaced or filled by the last.

    Args:
        model: a causal LM with full attention; its weights are changed by :meth:`load_weights`.
        eos_token_id: ends a response; it is part of it.
        max_slots: responses decoded together.
        max_length: tokens of prompt and response together.
        temperature: log-probs are of ``softmax(logits / temperature)``, which is what is sampled from. 0 decodes
            greedily; its tokens are certain, their log-prob is 0.
        kv_cache_on_update: keep or recompute keys and values at a weight swap.
        seed: of the sampling generator.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_id: int,
        max_slots: int,
        max_length: int,
        temperature: float = 1.0,
        kv_cache_on_update: KVCacheOnUpdate = KVCacheOnUpdate.recompute,
        seed: int = 0,
    ) -> None:
        layer_types = getattr(model.config, "layer_types", None)
        if layer_types and set(layer_types) != {"full_attention"}:
            raise ConfigError(
                f"engine=transformers needs full attention in every layer, found {sorted(set(layer_types))}; "
                "use another model or another engine"
            )
        self._model = model.eval()
        self._decoder = model.get_decoder()
        self._eos = eos_token_id
        self._temperature = temperature
        self._kv_cache_on_update = kv_cache_on_update
        self._max_length = max_length
        self._version = 0
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # index = slot
        device = model.device
        self._cache = SlotCache(model.config.num_hidden_layers, max_slots, max_length)
        self._max_slots = max_slots
        self._tokens = torch.zeros(max_slots, max_length, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(max_slots, max_length, dtype=torch.float32, device=device)
        self._versions = torch.zeros(max_slots, max_length, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(max_slots, dtype=torch.int64, device=device)  # tokens so far
        self._limits = torch.zeros(max_slots, dtype=torch.int64, device=device)  # prompt + max_new_tokens
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._generated_tokens = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def capacity(self) -> int:
        return self._max_slots

    @property
    def generated_tokens(self) -> int:
        return self._generated_tokens

    def submit(self, request: GenerationRequest) -> None:
        needed = len(request.prompt_token_ids) + request.max_new_tokens
        if needed > self._max_length:
            raise ValueError(
                f"request {request.request_id} needs {needed} tokens (prompt {len(request.prompt_token_ids)} + "
                f"max_new_tokens {request.max_new_tokens}), the engine holds {self._max_length}"
            )
        if not request.prompt_token_ids:
            raise ValueError(f"request {request.request_id} has an empty prompt")
        self._waiting.extend(_Sequence(request, i) for i in range(request.num_samples))

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self._fill_free_slots()
        n = len(self._running)
        if n == 0:
            return []
        positions = self._lengths[:n] - 1  # of the newest token, whose keys are not stored yet
        logits = self._decode(positions)
        sampled, log_probs = self._sample(logits.float())
        rows, at = torch.arange(n, device=sampled.device), self._lengths[:n]
        self._tokens[rows, at] = sampled
        self._log_probs[rows, at] = log_probs
        self._versions[rows, at] = self._version
        self._lengths[:n] += 1
        self._generated_tokens += n
        stopped = sampled == self._eos
        ended = (stopped | (self._lengths[:n] >= self._limits[:n])).nonzero()[:, 0].tolist()
        completions = [
            self._completion(row, FinishReason.STOP if stopped[row] else FinishReason.LENGTH) for row in ended
        ]
        self._release(ended)
        return completions

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    @torch.inference_mode()
    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        if version < self._version:
            raise ValueError(f"engine holds version {self._version}, was given the older version {version}")
        if tensors is None:
            self._version = version
            return
        parameters = dict(self._model.named_parameters())  # tied ones once, as they are published
        missing, unexpected = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
        if missing or unexpected:
            raise ValueError(
                f"weights of version {version} do not fit the engine's model: "
                f"missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
        self._version = version
        if self._kv_cache_on_update is KVCacheOnUpdate.recompute and self._running:
            n = len(self._running)
            order = self._lengths[:n].argsort(descending=True).tolist()
            self._prefill([([row], self._tokens[row, : int(self._lengths[row])]) for row in order])

    @torch.inference_mode()
    def abort(self, request_id: int) -> list[Completion]:
        waiting = [s for s in self._waiting if s.request.request_id == request_id]
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        rows = [row for row, s in enumerate(self._running) if s.request.request_id == request_id]
        completions = [self._completion(row, FinishReason.ABORTED) for row in rows]
        self._release(rows)
        empty = [Response(s.sample_index, [], [], [], FinishReason.ABORTED) for s in waiting]
        return completions + [Completion(request_id, response) for response in empty]

    def _decode(self, positions: Tensor) -> Tensor:
        """Logits [n, V] after the newest token of every slot in flight."""
        n = len(positions)
        read_length = int(positions.max()) + 1
        self._cache.decode_at(positions, read_length)
        mask = torch.arange(read_length, device=positions.device)[None, :] <= positions[:, None]
        rows = torch.arange(n, device=positions.device)
        return self._model(
            input_ids=self._tokens[rows, positions][:, None],
            position_ids=positions[:, None],
            attention_mask=mask[:, None, None, :],
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] drawn from ``logits`` [n, V] and their log-probs [n] under what they were drawn from."""
        if self._temperature == 0:
            tokens = logits.argmax(-1)
            return tokens, torch.zeros_like(tokens, dtype=torch.float32)
        log_probs = torch.log_softmax(logits / self._temperature, dim=-1)
        sampled = torch.multinomial(log_probs.exp(), 1, generator=self._generator)
        return sampled[:, 0], log_probs.gather(1, sampled)[:, 0]

    def _fill_free_slots(self) -> None:
        """Moves waiting responses into free slots; the samples of one prompt share one prefill."""
        fills: list[tuple[list[int], Tensor]] = []
        last_request: GenerationRequest | None = None
        while self._waiting and len(self._running) < self._max_slots:
            sequence, slot = self._waiting.popleft(), len(self._running)
            request = sequence.request
            self._running.append(sequence)
            prompt = torch.tensor(request.prompt_token_ids, dtype=torch.int64, device=self._tokens.device)
            self._tokens[slot, : len(prompt)] = prompt
            self._lengths[slot] = len(prompt)
            self._limits[slot] = len(prompt) + request.max_new_tokens
            if request is last_request:
                fills[-1][0].append(slot)
            else:
                fills.append(([slot], prompt))
            last_request = request
        self._prefill(fills)

    def _prefill(self, fills: Sequence[tuple[list[int], Tensor]]) -> None:
        """Stores keys and values of all tokens but the last (the next decode step feeds that one)."""
        pending = [(rows, tokens[:-1]) for rows, tokens in fills if len(tokens) > 1]
        while pending:
            width = max(len(tokens) for _, tokens in pending)
            many = max(1, _PREFILL_TOKENS // width)
            repeats = len(pending[0][0])
            chunk = [f for f in pending[:many] if len(f[0]) == repeats]
            pending = [f for f in pending if not any(f is c for c in chunk)]
            inputs = torch.zeros(
                len(chunk), max(len(t) for _, t in chunk), dtype=torch.int64, device=self._tokens.device
            )
            for i, (_, tokens) in enumerate(chunk):
                inputs[i, : len(tokens)] = tokens  # right padding: causal attention never looks at it
            targets = torch.tensor([row for rows, _ in chunk for row in rows], device=inputs.device)
            self._cache.prefill_into(targets)
            positions = torch.arange(inputs.shape[1], device=inputs.device)[None, :]
            causal = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=inputs.device).tril()
            self._decoder(
                input_ids=inputs,
                position_ids=positions,
                attention_mask=causal[None, None],
                past_key_values=self._cache,
                use_cache=True,
            )

    def _completion(self, row: int, reason: FinishReason) -> Completion:
        sequence = self._running[row]
        span = slice(len(sequence.request.prompt_token_ids), int(self._lengths[row]))
        response = Response(
            sequence.sample_index,
            self._tokens[row, span].tolist(),
            self._log_probs[row, span].tolist(),
            self._versions[row, span].tolist(),
            reason,
        )
        return Completion(sequence.request.request_id, response)

    def _release(self, rows: Sequence[int]) -> None:
        """Frees slots: the last slot in flight moves into each hole."""
        for row in sorted(rows, reverse=True):
            last = len(self._running) - 1
            if row != last:
                length = int(self._lengths[last])
                self._cache.move(last, row, length)
                for buffer in (self._tokens, self._log_probs, self._versions):
                    buffer[row, :length] = buffer[last, :length]
                self._lengths[row], self._limits[row] = self._lengths[last], self._limits[last]
                self._running[row] = self._running[last]
            self._running.pop()
