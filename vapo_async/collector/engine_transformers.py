"""The embedded engine: continuous batching over any Transformers decoder with full attention, in this process.

It steps synchronously, which makes a seeded run reproducible; ``benchmarks/engines.py`` sets its speed beside
Transformers' own continuous batching and ``generate``.
"""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.collector.engine_state import pack_samples, unpack_samples
from vapo_async.collector.nucleus import nucleus
from vapo_async.collector.prefill import prefill
from vapo_async.collector.samples import Sample, samples_of
from vapo_async.collector.slots import Slots
from vapo_async.config import ConfigError, KVCacheOnUpdate
from vapo_async.responses import copy_of
from vapo_async.schema import FinishReason, Response
from vapo_async.state import State, under


class TransformersEngine:
    """Decodes one token for every slot in flight a step; waiting responses fill freed slots in their order.

    Args:
        model: a causal LM with full attention; its weights are changed by :meth:`load_weights`.
        eos_token_id: ends a response; it is part of it.
        max_slots: responses decoded together.
        max_length: tokens of prompt and response together.
        temperature: log-probs are of ``softmax(logits / temperature)``, which is what is sampled from. 0 decodes
            greedily; its tokens are certain, their log-prob is 0.
        top_p: below 1 only the likeliest tokens that come to this probability are sampled from, and log-probs are of
            them alone, scaled to 1: for evaluations, as no learner can rebuild that.
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
        top_p: float = 1.0,
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
        self._temperature, self._top_p = temperature, top_p
        self._kv_cache_on_update = kv_cache_on_update
        self._max_length = max_length
        self._version = 0
        self._waiting: deque[Sample] = deque()
        self._finished: list[Sample] = []  # came finished, go out with the next step
        self._slots = Slots(model.config.num_hidden_layers, max_slots, max_length, model.device)
        self._generator = torch.Generator(device=model.device).manual_seed(seed)
        self._generated_tokens = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._slots) + len(self._finished)

    @property
    def capacity(self) -> int:
        return self._slots.rows

    @property
    def generated_tokens(self) -> int:
        return self._generated_tokens

    def submit(self, request: GenerationRequest) -> None:
        for sample in samples_of(request, max_length=self._max_length, eos_token_id=self._eos):
            unfinished = sample.response.finish_reason is FinishReason.ABORTED
            (self._waiting if unfinished else self._finished).append(sample)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        came_finished, self._finished = [_completion(s) for s in self._finished], []
        self._fill_free_slots()
        slots, n = self._slots, len(self._slots)
        if n == 0:
            return came_finished
        positions = slots.lengths[:n] - 1  # of the newest token, whose keys are not stored yet
        logits = self._decode(positions)
        sampled, log_probs = self._sample(logits.float())
        at_limit = slots.append(sampled, log_probs, self._version)
        self._generated_tokens += n
        stopped = sampled == self._eos
        ended = (stopped | at_limit).nonzero()[:, 0].tolist()
        reasons = [FinishReason.STOP if stopped[slot] else FinishReason.LENGTH for slot in ended]
        completions = [
            Completion(slots.in_flight[slot].request.request_id, slots.response(slot, reason))
            for slot, reason in zip(ended, reasons, strict=True)
        ]
        slots.release(ended)
        return came_finished + completions

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
        if self._kv_cache_on_update is KVCacheOnUpdate.recompute:
            self._compute_keys(list(range(len(self._slots))))

    @torch.inference_mode()
    def abort(self, request_id: int) -> list[Completion]:
        completions = [Completion(request_id, response) for response in self.partial(request_id)]
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        self._finished = [s for s in self._finished if s.request.request_id != request_id]
        self._slots.release(self._slots_of(request_id))
        return completions

    def partial(self, request_id: int) -> list[Response]:
        in_flight = [self._slots.response(slot, FinishReason.ABORTED) for slot in self._slots_of(request_id)]
        elsewhere = [s for s in (*self._waiting, *self._finished) if s.request.request_id == request_id]
        return in_flight + [copy_of(s.response) for s in elsewhere]

    def close(self) -> None:
        """Nothing runs outside of this process."""

    def state_dict(self) -> State:
        in_flight = [self._slots.sample(slot) for slot in range(len(self._slots))]
        state = pack_samples({"in_flight": in_flight, "waiting": self._waiting, "finished": self._finished})
        state.data |= {"generated_tokens": self._generated_tokens, "device": self._generator.device.type}
        state.tensors["generator"] = self._generator.get_state()
        # Keys computed anew would differ from these in the last bits, and the tokens that follow soon in more.
        cache = State(tensors=self._slots.cache.state_dict([s.length - 1 for s in in_flight]))
        state.tensors |= cache.nested("cache")
        return state

    @torch.inference_mode()
    def load_state_dict(self, state: State) -> None:
        if self.num_unfinished:
            raise RuntimeError(f"the engine has {self.num_unfinished} responses already, a state needs an idle one")
        samples = unpack_samples(state)
        in_flight, waiting = samples["in_flight"], samples["waiting"]
        longest = max((s.limit for s in in_flight + waiting), default=0)
        if longest > self._max_length:
            raise ConfigError(
                f"a saved response may take {longest} tokens with its prompt, the engine holds {self._max_length}; "
                "resume with task.max_prompt_tokens and task.max_response_tokens as they were"
            )
        rows, model = self._slots.rows, self._model
        for sample in in_flight[:rows]:
            self._slots.fill(sample)
        cached = [s.length - 1 for s in in_flight]
        self._slots.cache.load_state_dict(under(state.tensors, "cache"), cached, model.device, model.dtype)
        self._waiting.extend(in_flight[rows:] + waiting)
        self._finished = samples["finished"]
        self._generated_tokens = state.data["generated_tokens"]
        if state.data["device"] == self._generator.device.type:  # each kind of device draws numbers of its own
            self._generator.set_state(state.tensors["generator"])

    def _decode(self, positions: Tensor) -> Tensor:
        """Logits [n, V] after the newest token of every slot in flight."""
        slots, n = self._slots, len(positions)
        read_length = int(positions.max()) + 1
        slots.cache.decode_at(positions, read_length)
        mask = torch.arange(read_length, device=positions.device)[None, :] <= positions[:, None]
        rows = torch.arange(n, device=positions.device)
        return self._model(
            input_ids=slots.tokens[rows, positions][:, None],
            position_ids=positions[:, None],
            attention_mask=mask[:, None, None, :],
            past_key_values=slots.cache,
            use_cache=True,
        ).logits[:, -1]

    def _sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n] drawn from ``logits`` [n, V] and their log-probs [n] under what they were drawn from."""
        if self._temperature == 0:
            tokens = logits.argmax(-1)
            return tokens, torch.zeros_like(tokens, dtype=torch.float32)
        logits = logits / self._temperature
        if self._top_p < 1:
            logits = nucleus(logits, self._top_p)
        log_probs = torch.log_softmax(logits, dim=-1)
        sampled = torch.multinomial(log_probs.exp(), 1, generator=self._generator)
        return sampled[:, 0], log_probs.gather(1, sampled)[:, 0]

    def _fill_free_slots(self) -> None:
        """Moves waiting responses into free slots; the new samples of one prompt share one prefill."""
        fills: list[tuple[list[int], Tensor]] = []
        continued: list[int] = []
        last_request: GenerationRequest | None = None
        while self._waiting and len(self._slots) < self._slots.rows:
            sample = self._waiting.popleft()
            slot = self._slots.fill(sample)
            if sample.response.token_ids:
                continued.append(slot)
                continue
            if sample.request is last_request:
                fills[-1][0].append(slot)
            else:
                fills.append(([slot], self._slots.tokens_of(slot)))
            last_request = sample.request
        prefill(self._decoder, self._slots.cache, fills)
        self._compute_keys(continued)

    def _compute_keys(self, slots: list[int]) -> None:
        """Of all tokens that the slots hold but the newest."""
        fills = [([slot], self._slots.tokens_of(slot)) for slot in slots]
        prefill(self._decoder, self._slots.cache, sorted(fills, key=lambda fill: len(fill[1]), reverse=True))

    def _slots_of(self, request_id: int) -> list[int]:
        return [i for i, sample in enumerate(self._slots.in_flight) if sample.request.request_id == request_id]


def _completion(sample: Sample) -> Completion:
    return Completion(sample.request.request_id, sample.response)
