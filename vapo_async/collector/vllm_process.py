"""vLLM's ``AsyncLLM`` behind plain calls: its event loop runs in a thread, the engine in a process of its own."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput
from vllm.v1.engine import FinishReason as VLLMFinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vapo_async.collector.engine import EngineDiedError
from vapo_async.config import RunError

T = TypeVar("T")
_LOOK_AT_ENGINE_S = 1.0


@dataclass(frozen=True)
class SampleOutput:
    """What vLLM has generated for one sample."""

    token_ids: list[int]
    log_probs: list[float]
    spans: list[tuple[str, int, int]]
    """Label of the weights, first token, token after the last."""
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""


@dataclass
class _Running:
    """A sample in vLLM; ``known`` is set once vLLM knows it, and could end it."""

    known: asyncio.Event
    task: "asyncio.Task[None]"


class VLLMProcess:
    """Calls come from one thread, but for :attr:`generated_tokens`. Each ends when vLLM has done what it says.

    Args:
        args: of the engine.
        version: label of the weights that it starts with.

    Raises:
        RunError: it does not start.
        EngineDiedError: from every call, once the engine's process is gone.
    """

    def __init__(self, args: AsyncEngineArgs, version: int) -> None:
        self._news = threading.Event()  # an iteration has ended, or there will be no more
        self._ended: deque[tuple[str, SampleOutput]] = deque()
        self._failure: BaseException | None = None
        self._running: dict[str, _Running] = {}  # of the loop's thread
        self.generated_tokens = 0
        """Tokens sampled so far."""
        self.last_pause_s = 0.0
        """Seconds for which the last swap of weights kept the engine from sampling; 0 before the first."""
        self._iterated_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            start = self._start_engine(args, str(version))
            self._llm = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        except Exception as error:
            self._stop_loop()
            told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).strip()
            first = (told or type(error).__name__).splitlines()[0]
            raise RunError(f"vLLM's engine did not start: {first}; what it wrote says more") from error
        except BaseException:
            self._stop_loop()
            raise

    def start(self, name: str, prompt: list[int], params: SamplingParams, cache_salt: str) -> None:
        """Has ``prompt`` continued; the outcome comes with :meth:`ended` under ``name``."""
        self._raise_failure()

        def start() -> None:
            known = asyncio.Event()
            task = self._loop.create_task(self._generate(name, prompt, params, cache_salt, known))
            self._running[name] = _Running(known, task)

        self._loop.call_soon_threadsafe(start)

    def wait(self) -> None:
        """Until the engine has made an iteration since the last call. Does not return from an engine that hangs."""
        self._raise_failure()  # there is no news after it
        self._news.wait()
        self._news.clear()
        self._raise_failure()

    def ended(self) -> list[tuple[str, SampleOutput]]:
        """By name, samples that ended since the last call."""
        self._raise_failure()
        ended = []
        with suppress(IndexError):
            while True:
                ended.append(self._ended.popleft())
        return ended

    def abort(self, names: Sequence[str]) -> None:
        """Ends samples; their outcomes are there when it returns."""
        self._call(self._abort(names))

    def snapshot(self, names: Sequence[str]) -> dict[str, SampleOutput]:
        """By name, what there is of samples that have not ended, as if they were aborted now; they go on."""
        return self._call(self._snapshot(names))

    def load(
        self, update: Mapping[str, Any], version: int, *, clear_cache: bool, join: Mapping[str, Any] | None = None
    ) -> None:
        """Swaps the weights under the samples in flight.

        Args:
            update: what the receiving end of the weight transfer is told.
            version: of the weights.
            clear_cache: has the keys of the samples in flight computed anew.
            join: what that end is told beforehand, to connect to the learner anew.
        """
        self._call(self._load(dict(update), str(version), clear_cache, join))

    def label(self, version: int) -> None:
        """The same weights under a newer version."""
        self._call(self._llm.update_weight_version(str(version)))

    def seed(self, seed: int) -> None:
        """Starts the sampling generators of the engine anew."""
        self._call(self._llm.collective_rpc("seed_sampling", args=(seed,)))

    def close(self) -> None:
        """Ends the engine's process. Closing twice is fine."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
            self._stop_loop()

    async def _start_engine(self, args: AsyncEngineArgs, label: str) -> AsyncLLM:
        def progress(config: VllmConfig, index: int = 0) -> StatLoggerBase:
            return _Progress(self)

        llm = AsyncLLM.from_engine_args(args, stat_loggers=[progress])
        await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await llm.update_weight_version(label)
        return llm

    def iterated(self, tokens: int) -> None:
        """The engine has made an iteration that sampled so many tokens."""
        self.generated_tokens += tokens
        self._iterated_at = time.monotonic()
        self._news.set()

    async def _generate(
        self, name: str, prompt: list[int], params: SamplingParams, cache_salt: str, known: asyncio.Event
    ) -> None:
        try:
            inputs = tokens_input(prompt, cache_salt=cache_salt)
            outputs = await self._llm.add_request(name, inputs, params)
            known.set()
            output: Any = await outputs.get()  # there is only the final one
            self._ended.append((name, _sample_output(output.outputs[0])))
        except Exception as error:  # noqa: BLE001 (raised by the next call)
            self._failure = self._failure or error
        finally:
            known.set()
            del self._running[name]
            self._news.set()

    async def _abort(self, names: Iterable[str]) -> None:
        running = {name: self._running[name] for name in names if name in self._running}
        for sample in running.values():
            await sample.known.wait()  # before that it cannot be ended
        await self._llm.abort(list(running))
        await asyncio.gather(*(sample.task for sample in running.values()))

    async def _snapshot(self, names: Iterable[str]) -> dict[str, SampleOutput]:
        found = {}
        processor = self._llm.output_processor
        for name in names:
            running = self._running.get(name)
            if running is None:
                continue
            await running.known.wait()
            for internal in processor.external_req_ids.get(name, ()):
                # What an abort would give: vLLM has no public way to look at a request without ending it.
                state = processor.request_states[internal]
                output: Any = state.make_request_output([], None, VLLMFinishReason.ABORT, None)
                found[name] = _sample_output(output.outputs[0])
        return found

    async def _load(
        self, update: dict[str, Any], label: str, clear_cache: bool, join: Mapping[str, Any] | None
    ) -> None:
        llm = self._llm
        called = time.monotonic()
        await llm.pause_generation(mode="keep", clear_cache=clear_cache)
        paused = max(called, self._iterated_at)  # the iteration that was under way has ended as any other
        try:
            if join is not None:
                await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(join)))
            await llm.start_weight_update()
            await llm.update_weights(WeightTransferUpdateRequest(update_info=update))
            await llm.finish_weight_update(weight_version=label)
        except EngineDeadError:
            raise
        except Exception as error:  # vLLM's own type for whatever happened in its process
            raise RunError(f"vLLM did not take the weights of version {label}: {error}; its log says more") from error
        await llm.resume_generation()
        self.last_pause_s = time.monotonic() - paused

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` in the loop's thread; its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(timeout=_LOOK_AT_ENGINE_S)
            except EngineDeadError as error:
                raise _dead() from error
            except TimeoutError as error:
                if future.done():
                    raise
                if self._llm.errored:  # vLLM leaves who waits for a control call waiting
                    future.cancel()
                    raise _dead() from error

    def _raise_failure(self) -> None:
        if isinstance(self._failure, EngineDeadError):
            raise _dead() from self._failure
        if self._failure is not None:
            raise RunError(f"vLLM refused a request: {self._failure}") from self._failure
        if self._llm.errored:  # while nothing was running
            raise _dead()

    async def _shut_down(self) -> None:
        self._llm.shutdown()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:  # a loop that stops before they have ended leaves complaints in the log
            await asyncio.wait(tasks, timeout=_LOOK_AT_ENGINE_S)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class _Progress(StatLoggerBase):
    """Told by vLLM of every iteration of its engine, in the loop's thread."""

    def __init__(self, process: VLLMProcess) -> None:
        self._process = process

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is not None:
            self._process.iterated(iteration_stats.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _sample_output(output: CompletionOutput) -> SampleOutput:
    log_probs: Any = output.logprobs  # flat: one entry per token, as only the sampled one's is asked for
    spans = [(span.version, span.start, span.end) for span in output.weight_versions or ()]
    tokens = list(output.token_ids)
    return SampleOutput(tokens, list(log_probs.logprobs) if tokens else [], spans, str(output.finish_reason))


def _dead() -> EngineDiedError:
    return EngineDiedError("vLLM's engine process died")
