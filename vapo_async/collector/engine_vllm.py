"""vLLM as the rollout engine: continuous batching in a process of its own, weights changed under requests in flight.

Every sample is a request of vLLM's, with the samples of one prompt sharing its blocks of the KV cache. vLLM steps
unasked; this side gathers what has finished.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.collector.samples import Sample, samples_of, settled
from vapo_async.collector.vllm_process import SampleOutput, VLLMProcess
from vapo_async.collector.vllm_settings import engine_args, parameter_shapes
from vapo_async.config import KVCacheOnUpdate, VLLMEngineConfig
from vapo_async.responses import copy_of
from vapo_async.schema import FinishReason, Response

_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORTED}


class VLLMEngine:
    """See :class:`vapo_async.collector.engine.Engine`.

    Args:
        model: a Hugging Face folder.
        config: of the engine.
        eos_token_id: ends a response; it is part of it.
        max_length: tokens of prompt and response together.
        temperature: log-probs are of ``softmax(logits / temperature)``. 0 decodes greedily; log-probs are then 0.
        top_p: as :class:`~vapo_async.collector.engine_transformers.TransformersEngine` has it.
        seed: of the sampling generators.
        dtype: of weights and KV cache.
        share: puts weights where vLLM's processes find them by a path, for as long as it is open.
        backend: name of vLLM's weight transfer that reads from there.
    """

    def __init__(
        self,
        model: Path,
        config: VLLMEngineConfig,
        *,
        eos_token_id: int,
        max_length: int,
        temperature: float,
        seed: int,
        dtype: str,
        share: Callable[[Mapping[str, Tensor]], AbstractContextManager[str]],
        backend: str,
        top_p: float = 1.0,
    ) -> None:
        self._eos = eos_token_id
        self._capacity, self._max_length = config.max_slots, max_length
        self._temperature, self._top_p = temperature, top_p
        self._recompute = config.kv_cache_on_update is KVCacheOnUpdate.recompute
        self._share = share
        self._version = 0
        self._samples: dict[str, Sample] = {}  # in vLLM, by the name of their request there
        self._finished: deque[Completion] = deque()  # not handed out yet
        self._shapes = parameter_shapes(model)
        args = engine_args(model, config, dtype=dtype, max_length=max_length, seed=_seed32(seed), backend=backend)
        self._process = VLLMProcess(args, version=0)

    @property
    def version(self) -> int:
        return self._version

    @property
    def num_unfinished(self) -> int:
        return len(self._samples) + len(self._finished)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def generated_tokens(self) -> int:
        return self._process.generated_tokens

    def submit(self, request: GenerationRequest) -> None:
        for sample in samples_of(request, max_length=self._max_length, eos_token_id=self._eos):
            response = sample.response
            if response.finish_reason is not FinishReason.ABORTED:
                self._finished.append(Completion(request.request_id, response))
                continue
            name = _name(request.request_id, response.sample_index)
            params = SamplingParams(
                temperature=self._temperature,
                top_p=self._top_p,
                max_tokens=request.max_new_tokens - len(response.token_ids),
                stop_token_ids=[self._eos],
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._samples[name] = sample
            # Responses that are submitted now share no keys of older weights. With kept keys one that waited for a slot
            # during an update finds its prompt's old ones, if a sample of the same prompt has left them.
            prompt = [*request.prompt_token_ids, *response.token_ids]
            self._process.start(name, prompt, params, cache_salt=str(self._version))

    def step(self) -> list[Completion]:
        if self._samples and not self._finished:
            self._process.wait()
        self._gather()
        finished, self._finished = list(self._finished), deque()
        return finished

    def seed(self, seed: int) -> None:
        self._process.seed(_seed32(seed))

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        if version < self._version:
            raise ValueError(f"engine holds version {self._version}, was given the older version {version}")
        if tensors is None:
            self._process.label(version)
        else:
            self._check_shapes(version, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
            with self._share(tensors) as path:
                self._process.load({"path": path}, version, clear_cache=self._recompute)
        self._version = version

    def receive_weights(self, version: int, update: Mapping[str, Any], join: Mapping[str, Any] | None) -> None:
        self._check_shapes(version, dict(zip(update["names"], map(tuple, update["shapes"]), strict=True)))
        self._process.load(update, version, clear_cache=self._recompute, join=join)
        self._version = version

    def abort(self, request_id: int) -> list[Completion]:
        self._process.abort(self._names_of(request_id))
        self._gather()
        mine = [completion for completion in self._finished if completion.request_id == request_id]
        self._finished = deque(c for c in self._finished if c.request_id != request_id)
        return mine

    def partial(self, request_id: int) -> list[Response]:
        responses = [
            self._response(self._samples[name], output)
            for name, output in self._process.snapshot(self._names_of(request_id)).items()
        ]
        self._gather()  # a snapshot leaves out what has ended
        in_flight = [r for r in responses if _name(request_id, r.sample_index) in self._samples]
        return in_flight + [copy_of(c.response) for c in self._finished if c.request_id == request_id]

    def close(self) -> None:
        self._process.close()

    def _check_shapes(self, version: int, found: Mapping[str, tuple[int, ...]]) -> None:
        """Before vLLM is touched: it takes a layer with parts missing, and is of no more use after a wrong shape."""
        missing, unexpected = sorted(self._shapes.keys() - found.keys()), sorted(found.keys() - self._shapes.keys())
        reshaped = [name for name, shape in self._shapes.items() if found.get(name, shape) != shape]
        if missing or unexpected or reshaped:
            raise ValueError(
                f"weights of version {version} do not fit the engine's model: missing {missing[:3]}, "
                f"unexpected {unexpected[:3]}, of another shape {reshaped[:3]}"
            )

    def _names_of(self, request_id: int) -> list[str]:
        return [name for name, sample in self._samples.items() if sample.request.request_id == request_id]

    def _gather(self) -> None:
        for name, output in self._process.ended():
            sample = self._samples.pop(name)
            self._finished.append(Completion(sample.request.request_id, self._response(sample, output)))

    def _response(self, sample: Sample, output: SampleOutput) -> Response:
        """What ``sample`` brought along and what vLLM made of it."""
        before = sample.response
        tokens, log_probs = output.token_ids, output.log_probs
        if len(log_probs) != len(tokens):
            raise RuntimeError(f"vLLM gave {len(tokens)} tokens and {len(log_probs)} log-probs")
        if self._temperature == 0:
            log_probs = [0.0] * len(tokens)
        response = Response(
            before.sample_index,
            before.token_ids + tokens,
            before.log_probs + log_probs,
            before.versions + versions_of(output.spans, len(tokens), self._version),
            _REASONS[output.finish_reason],
        )
        return settled(response, sample.request.max_new_tokens, self._eos)


def versions_of(spans: list[tuple[str, int, int]], tokens: int, newest: int) -> list[int]:
    """One version per token from vLLM's spans (label, start, end).

    Raises:
        RuntimeError: the spans do not cover the tokens once each in their order, or their versions fall or are ahead of
            ``newest``.
    """
    versions: list[int] = []
    for label, start, end in spans:
        version = int(label) if label.isdecimal() else -1
        in_order = start == len(versions) and end >= start
        if not in_order or not (versions[-1] if versions else 0) <= version <= newest:
            raise RuntimeError(f"vLLM's weight versions {spans} do not fit {tokens} tokens up to version {newest}")
        versions += [version] * (end - start)
    if len(versions) != tokens:
        raise RuntimeError(f"vLLM's weight versions {spans} cover {len(versions)} of {tokens} tokens")
    return versions


def _name(request_id: int, sample_index: int) -> str:
    return f"{request_id}/{sample_index}"


def _seed32(seed: int) -> int:
    return seed % 2**32
