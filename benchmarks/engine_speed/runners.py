"""The engines of this process, behind one way to run a workload. vLLM is in :mod:`engine_speed.vllm_runner`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from engine_speed.workloads import Workload
from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import KVCacheOnUpdate

BASELINE, VLLM = "generate", "vllm"
PAGE: Final = 32  # tokens of a page of the continuous batching's cache
POLL_S: Final = 0.01
"""Longest wait for news where an engine does not step in the caller's thread."""


@dataclass(frozen=True)
class Setting:
    """What an engine is made for."""

    model: PreTrainedModel
    folder: Path
    """The same model on disk."""
    concurrency: int
    max_length: int
    """Tokens of prompt and response together."""


@dataclass(frozen=True)
class UpdateTimes:
    """Of one weight update, in seconds."""

    standstill_s: float
    """Nothing is generated."""
    load_s: float
    """The call, with the weights where the engine reads them."""
    call_s: float
    """The whole call, with the time that it takes to bring the weights there."""


class Runner(Protocol):
    """Runs one workload after the other; no end token is ever sampled."""

    processes: tuple[psutil.Process, ...]
    """Its own ones, besides this process."""

    def close(self) -> None:
        """Ends what it runs."""
        ...

    def start(self, work: Workload, on_update: KVCacheOnUpdate) -> None:
        """Takes a workload in the order of arrival; at most ``concurrency`` responses of it are in flight."""
        ...

    def advance(self) -> list[tuple[int, int]]:
        """Goes on for a moment. Index and written tokens of each response that has ended since the last call."""
        ...


@runtime_checkable
class UpdatableRunner(Runner, Protocol):
    """Takes new weights under responses in flight."""

    def update(self, weights: Mapping[str, Tensor]) -> UpdateTimes:
        """Between two calls of :meth:`advance`."""
        ...


class Embedded:
    """``engine=transformers``: steps in the caller's thread, so that an update is all standstill."""

    processes: tuple[psutil.Process, ...] = ()

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def start(self, work: Workload, on_update: KVCacheOnUpdate) -> None:
        model = self._setting.model
        self._engine = TransformersEngine(
            model,
            eos_token_id=model.config.vocab_size,  # does not exist
            max_slots=self._setting.concurrency,
            max_length=self._setting.max_length,
            kv_cache_on_update=on_update,
        )
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            self._engine.submit(GenerationRequest(i, tuple(prompt), 1, length))

    def advance(self) -> list[tuple[int, int]]:
        return [(ended.request_id, len(ended.response.log_probs)) for ended in self._engine.step()]

    def update(self, weights: Mapping[str, Tensor]) -> UpdateTimes:
        called = time.perf_counter()
        self._engine.load_weights(self._engine.version + 1, weights)
        took = time.perf_counter() - called
        return UpdateTimes(took, took, took)

    def close(self) -> None:
        """Nothing runs."""


class ContinuousBatching:
    """Transformers' ``ContinuousBatchingManager``: generates in a thread; its cache cannot be computed anew."""

    processes: tuple[psutil.Process, ...] = ()

    def __init__(self, setting: Setting) -> None:
        self._model = setting.model
        pages = setting.concurrency * (-(-setting.max_length // PAGE) + 1)
        model: Any = setting.model
        self._manager = model.init_continuous_batching(
            generation_config=sampling(setting.model, setting.max_length),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=pages,  # the default takes all memory there is
                max_batch_tokens=max(512, setting.concurrency),
                max_requests_per_batch=setting.concurrency,
                return_logprobs=True,
                use_async_batching=False,
                seed=0,
            ),
        )
        self._manager.start()

    def start(self, work: Workload, on_update: KVCacheOnUpdate) -> None:
        pairs = zip(work.prompts, work.lengths, strict=True)
        names = [self._manager.add_request(prompt, max_new_tokens=length) for prompt, length in pairs]
        self._places = {name: i for i, name in enumerate(names)}

    def advance(self) -> list[tuple[int, int]]:
        result = self._manager.get_result(timeout=POLL_S)
        if result is None and self._manager.is_running():
            return []
        if result is None or result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error if result else 'it has stopped'}")
        return [(self._places[result.request_id], len(result.logprobs))]

    def update(self, weights: Mapping[str, Tensor]) -> UpdateTimes:
        called = time.perf_counter()
        with self._manager.pause(), torch.no_grad():
            paused = time.perf_counter()
            for name, parameter in self._model.named_parameters():
                parameter.copy_(weights[name])
        resumed = time.perf_counter()
        return UpdateTimes(resumed - paused, resumed - called, resumed - called)

    def close(self) -> None:
        self._manager.stop()


class Generate:
    """``model.generate`` on left-padded batches of ``concurrency`` requests; weights change between two of them."""

    processes: tuple[psutil.Process, ...] = ()

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def start(self, work: Workload, on_update: KVCacheOnUpdate) -> None:
        self._work, self._next = work, 0

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, int]]:
        model: Any = self._setting.model
        first, last = self._next, min(self._next + self._setting.concurrency, len(self._work.prompts))
        self._next = last
        prompts, lengths = self._work.prompts[first:last], self._work.lengths[first:last]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = sampling(model, max(lengths), return_dict_in_generate=True, output_scores=True)
        out = model.generate(ids, attention_mask=mask, generation_config=config)
        log_probs = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, width:, None])[..., 0]
        return [(first + i, len(row[:length])) for i, (row, length) in enumerate(zip(log_probs, lengths, strict=True))]

    def close(self) -> None:
        """Nothing runs."""


def sampling(model: PreTrainedModel, longest: int, **settings: object) -> GenerationConfig:
    """Plain sampling at T = 1 with an end token that does not exist (without one the model's own would be taken)."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    return GenerationConfig(max_new_tokens=longest, eos_token_id=model.config.vocab_size, **(plain | settings))


def vllm(setting: Setting) -> Runner:
    """vLLM in a process of its own."""
    from engine_speed.vllm_runner import VLLMRunner  # importing vLLM takes seconds

    return VLLMRunner(setting)


@dataclass(frozen=True)
class Engine:
    """What is measured under one name."""

    make: Callable[[Setting], Runner]
    kv_cache: tuple[KVCacheOnUpdate, ...] = ()
    """What it can do with the keys of older weights; none: it takes no weights under responses in flight."""
    start_s: float = 0.5
    """About what start and first batch take."""


KEEP, RECOMPUTE = KVCacheOnUpdate.keep, KVCacheOnUpdate.recompute
ENGINES: Final = {
    "embedded": Engine(Embedded, (KEEP, RECOMPUTE)),
    VLLM: Engine(vllm, (KEEP, RECOMPUTE), start_s=15.0),
    "continuous batching": Engine(ContinuousBatching, (KEEP,)),
    BASELINE: Engine(Generate),
}


@contextmanager
def running(engines: Sequence[str], setting: Setting) -> Iterator[dict[str, Runner]]:
    """By name; they are warm, and end with this."""
    with ExitStack() as stack:
        runners = {}
        for name in engines:
            runners[name] = ENGINES[name].make(setting)
            stack.callback(runners[name].close)
            run(runners[name], Workload([[3, 4]] * setting.concurrency, [2] * setting.concurrency))
        yield runners


def run(
    runner: Runner,
    work: Workload,
    on_update: KVCacheOnUpdate = KVCacheOnUpdate.keep,
    at_first_end: Callable[[], None] | None = None,
) -> None:
    """Until all is written; ``at_first_end`` is called once, when the first response has ended.

    Raises:
        RuntimeError: a response has another length than was asked for.
    """
    written: dict[int, int] = {}
    runner.start(work, on_update)
    while len(written) < len(work.prompts):
        written.update(runner.advance())
        if written and at_first_end is not None:
            at_first_end()
            at_first_end = None
    if [written[i] for i in range(len(work.prompts))] != work.lengths:
        raise RuntimeError(f"{type(runner).__name__} did not write the tokens that were asked for")
