"""Speed of the embedded engine beside Transformers' continuous batching and ``generate``; the cost of a weight update.

    python benchmarks/engines.py --json engines.json      a minute on one core
    python benchmarks/engines.py --quick                   seconds: does it run?

Random weights in the shape of the embedded model, one torch thread. Every engine gets the same prompts and the same
number of tokens to write for each (no end token is ever sampled), keeps at most ``concurrency`` responses in flight,
samples at T = 1 and returns log-probs. Lengths are *uniform* (all the same) or *long-tailed* (log-normal, σ = 1). Only
tokens that were asked for count: ``generate`` runs a batch until its longest response ends. All engines take turns
within each repeat; the table shows medians. CPU-seconds are the process's own, which a busy machine disturbs less.
"""

import contextlib
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import transformers
from bench import announce, command_line, environment, parse
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import EmbeddedModelConfig, KVCacheOnUpdate, SmolLM2ModelConfig
from vapo_async.metrics.console import format_duration
from vapo_async.models.load import load_policy
from vapo_async.models.pretrain import new_model
from vapo_async.models.smollm2 import ensure_smollm2
from vapo_async.weights.mailbox import published_tensors

BASELINE = "generate"
PAGE = 32  # tokens of a page of the continuous batching's cache
RESULT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    concurrency: tuple[int, ...]
    uniform_tokens: int
    """Of every response with uniform lengths; half of it is the median of long-tailed ones."""
    longest_tokens: int
    """Long-tailed lengths are cut here."""
    repeats: int
    requests_per_slot: int = 2


FULL = Sizes((8, 32, 128), 48, 128, repeats=3)
QUICK = Sizes((4,), 8, 16, repeats=1)
SMOLLM2 = Sizes((4, 16), 16, 48, repeats=1)


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens to write for each."""

    prompts: list[list[int]]
    lengths: list[int]


@dataclass(frozen=True)
class SpeedRow:
    """Medians over the repeats. Tokens are those that were asked for."""

    model: str
    lengths: str
    concurrency: int
    engine: str
    requests: int
    tokens: int
    tokens_per_s: float
    tokens_per_cpu_s: float
    speedup: float
    """tokens_per_s by that of ``generate``."""
    cpu_speedup: float


@dataclass(frozen=True)
class StallRow:
    """A weight update under ``concurrency`` responses in flight, medians."""

    model: str
    concurrency: int
    kv_cache: str
    tokens_in_flight: int
    stall_ms: float
    stall_cpu_ms: float
    decode_step_ms: float
    decode_step_cpu_ms: float


Run = Callable[[Workload], list[int]]
"""Generates a workload; returns the tokens written for each request."""


@contextlib.contextmanager
def embedded(model: PreTrainedModel, concurrency: int, longest: int) -> Iterator[Run]:
    """``engine=transformers``."""

    def run(work: Workload) -> list[int]:
        engine = make_engine(model, concurrency, longest)
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            engine.submit(GenerationRequest(i, tuple(prompt), 1, length))
        written = [0] * len(work.prompts)
        while engine.num_unfinished:
            for completion in engine.step():
                written[completion.request_id] = len(completion.response.log_probs)
        return written

    yield run


@contextlib.contextmanager
def continuous_batching(model: PreTrainedModel, concurrency: int, longest: int) -> Iterator[Run]:
    """Transformers' ``ContinuousBatchingManager``, started beforehand."""
    pages = concurrency * (-(-longest // PAGE) + 1)
    manager = model.init_continuous_batching(  # type: ignore[operator]
        generation_config=sampling(model, longest),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages,  # the default takes all memory there is
            max_batch_tokens=max(512, concurrency),
            max_requests_per_batch=concurrency,
            return_logprobs=True,
            use_async_batching=False,
            seed=0,
        ),
    )

    def run(work: Workload) -> list[int]:
        places: dict[str | None, int] = {}
        for i, (prompt, length) in enumerate(zip(work.prompts, work.lengths, strict=True)):
            places[manager.add_request(prompt, max_new_tokens=length)] = i
        written = [0] * len(work.prompts)
        for _ in work.prompts:
            result = manager.get_result(timeout=RESULT_TIMEOUT_S)
            if result is None or result.error is not None:
                raise RuntimeError(f"continuous batching failed: {result.error if result else 'no result in time'}")
            written[places[result.request_id]] = len(result.logprobs)
        return written

    manager.start()
    try:
        run(Workload([[3, 4]], [2]))  # the cache is made by the first request
        yield run
    finally:
        manager.stop()


@contextlib.contextmanager
def generate(model: PreTrainedModel, concurrency: int, longest: int) -> Iterator[Run]:
    """``model.generate`` on left-padded batches of ``concurrency`` requests in the order of arrival."""

    @torch.inference_mode()
    def run(work: Workload) -> list[int]:
        written = []
        for first in range(0, len(work.prompts), concurrency):
            prompts, lengths = work.prompts[first : first + concurrency], work.lengths[first : first + concurrency]
            width = max(len(prompt) for prompt in prompts)
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            config = sampling(model, max(lengths), return_dict_in_generate=True, output_scores=True)
            out = model.generate(ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            log_probs = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, width:, None])[..., 0]
            written += [len(row[:length]) for row, length in zip(log_probs, lengths, strict=True)]
        return written

    yield run


ENGINES = {"embedded": embedded, "continuous batching": continuous_batching, BASELINE: generate}


def sampling(model: PreTrainedModel, longest: int, **settings: object) -> GenerationConfig:
    """Plain sampling at T = 1 with an end token that does not exist (without one the model's own would be taken)."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    return GenerationConfig(max_new_tokens=longest, eos_token_id=model.config.vocab_size, **(plain | settings))


def make_engine(
    model: PreTrainedModel, concurrency: int, longest: int, on_update: KVCacheOnUpdate = KVCacheOnUpdate.keep
) -> TransformersEngine:
    """An engine whose end token does not exist."""
    return TransformersEngine(
        model,
        eos_token_id=model.config.vocab_size,
        max_slots=concurrency,
        max_length=longest,
        kv_cache_on_update=on_update,
    )


def make_workload(kind: str, concurrency: int, sizes: Sizes, seed: int = 0) -> Workload:
    """The same one for every engine."""
    draw = random.Random(f"{seed}/{kind}/{concurrency}")
    count = sizes.requests_per_slot * concurrency
    prompts = [[draw.randrange(3, 18) for _ in range(draw.randint(4, 24))] for _ in range(count)]
    if kind == "uniform":
        return Workload(prompts, [sizes.uniform_tokens] * count)
    tail = [sizes.uniform_tokens / 2 * draw.lognormvariate(0, 1) for _ in range(count)]
    return Workload(prompts, [min(max(round(length), 1), sizes.longest_tokens) for length in tail])


def speed_rows(name: str, model: PreTrainedModel, sizes: Sizes) -> Iterator[SpeedRow]:
    """One row for each engine, kind of lengths and concurrency."""
    longest = sizes.longest_tokens + 24
    done, total, start = 0, len(sizes.concurrency) * 2 * sizes.repeats * len(ENGINES), time.perf_counter()
    for concurrency in sizes.concurrency:
        with contextlib.ExitStack() as stack:
            runs = {key: stack.enter_context(make(model, concurrency, longest)) for key, make in ENGINES.items()}
            for kind in ("uniform", "long-tailed"):
                work = make_workload(kind, concurrency, sizes)
                tokens = sum(work.lengths)
                wall: dict[str, list[float]] = {key: [] for key in runs}
                cpu: dict[str, list[float]] = {key: [] for key in runs}
                for _ in range(sizes.repeats):
                    for key, run in runs.items():
                        wall_s, cpu_s = time.perf_counter(), time.process_time()
                        written = run(work)
                        wall[key].append(tokens / (time.perf_counter() - wall_s))
                        cpu[key].append(tokens / (time.process_time() - cpu_s))
                        if written != work.lengths:
                            raise RuntimeError(f"{key} did not write the tokens that were asked for")
                        done += 1
                        eta_s = (time.perf_counter() - start) / done * (total - done)
                        print(
                            f"[{done}/{total}] {name}, {concurrency} in flight, {kind}, {key}: "
                            f"{wall[key][-1]:,.0f} tokens/s · eta {format_duration(eta_s)}",
                            flush=True,
                        )
                base = statistics.median(wall[BASELINE]), statistics.median(cpu[BASELINE])
                for key in runs:
                    speed, cpu_speed = statistics.median(wall[key]), statistics.median(cpu[key])
                    ratios = speed / base[0], cpu_speed / base[1]
                    yield SpeedRow(name, kind, concurrency, key, len(work.lengths), tokens, speed, cpu_speed, *ratios)


def stall_rows(name: str, model: PreTrainedModel, sizes: Sizes) -> Iterator[StallRow]:
    """What :meth:`TransformersEngine.load_weights` takes under responses of ``uniform_tokens`` tokens and growing."""
    weights = published_tensors(model)
    updates = 2 * sizes.repeats + 1
    for concurrency in sizes.concurrency:
        for on_update in (KVCacheOnUpdate.keep, KVCacheOnUpdate.recompute):
            work = make_workload("uniform", concurrency, sizes)
            engine = make_engine(model, concurrency, sizes.uniform_tokens + updates + 25, on_update)
            for i, prompt in enumerate(work.prompts[:concurrency]):
                engine.submit(GenerationRequest(i, tuple(prompt), 1, sizes.uniform_tokens + updates + 1))
            for _ in range(sizes.uniform_tokens):
                engine.step()
            stalls: list[tuple[float, float]] = []
            steps: list[tuple[float, float]] = []
            for version in range(1, updates + 1):
                start = _now()
                engine.load_weights(version, weights)
                loaded = _now()
                engine.step()
                stalls.append(_milliseconds(start, loaded))
                steps.append(_milliseconds(loaded, _now()))
            held = sum(len(prompt) for prompt in work.prompts[:concurrency]) + concurrency * sizes.uniform_tokens
            medians = [statistics.median(column) for rows in (stalls, steps) for column in zip(*rows, strict=True)]
            yield StallRow(name, concurrency, on_update.value, held, *medians)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _milliseconds(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """Wall and CPU."""
    return 1000 * (end[0] - start[0]), 1000 * (end[1] - start[1])


def print_tables(speeds: list[SpeedRow], stalls: list[StallRow]) -> None:
    """Both tables as text."""
    print(f"\n{'tokens/s':<48}{'× generate':>20}{'per CPU-second':>16}{'× generate':>12}")
    for row in speeds:
        head = f"{row.model}  {row.lengths:<12}{row.concurrency:>4}  {row.engine:<20}"
        ratios = f"{row.speedup:>12.2f}{row.tokens_per_cpu_s:>16,.0f}{row.cpu_speedup:>12.2f}"
        print(f"{head}{row.tokens_per_s:>12,.0f}{ratios}")
    columns = "".join(f"{title:>16}" for title in ("stall ms", "CPU ms", "decode step ms", "CPU ms"))
    print(f"\n{'weight update, embedded engine':<35}{'KV cache':<12}{'tokens in flight':>16}{columns}")
    for stall in stalls:
        head = f"{stall.model}  {stall.concurrency:>4} in flight"
        times = stall.stall_ms, stall.stall_cpu_ms, stall.decode_step_ms, stall.decode_step_cpu_ms
        values = "".join(f"{ms:>16.1f}" for ms in times)
        print(f"{head:<35}{stall.kv_cache:<12}{stall.tokens_in_flight:>16,}{values}")


def main(arguments: list[str]) -> int:
    """Runs it, prints tables, writes rows."""
    parser = command_line(__doc__)
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M too, at small counts (many minutes)")
    options = parse(parser, arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = environment(transformers=transformers.__version__)
    announce(before)
    models = {"tiny": (new_model(EmbeddedModelConfig()).eval(), QUICK if options.quick else FULL)}
    if options.smollm2:
        folder = ensure_smollm2(SmolLM2ModelConfig(), print)
        models["smollm2"] = load_policy(folder, "float32"), QUICK if options.quick else SMOLLM2
    speeds: list[SpeedRow] = []
    stalls: list[StallRow] = []
    for name, (model, sizes) in models.items():
        speeds += speed_rows(name, model, sizes)
        stalls += stall_rows(name, model, sizes)
    print_tables(speeds, stalls)
    if options.json is not None:
        environments = {
            "environment": before,
            "load_average_after": environment()["load_average"],
        }
        rows = {"speed": [asdict(row) for row in speeds], "weight_update": [asdict(row) for row in stalls]}
        options.json.write_text(json.dumps({**environments, **rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
