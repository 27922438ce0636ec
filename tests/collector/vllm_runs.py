"""What the tests of the vLLM engine share: an engine that surely ends, and Hugging Face's word on its log-probs."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from conftest import tiny_policy
from torch import Tensor
from transformers import PreTrainedModel

from vapo_async.collector.engine import Completion
from vapo_async.collector.vllm_environment import prepare_vllm
from vapo_async.config import VLLMEngineConfig
from vapo_async.schema import Response
from vapo_async.weights.shared_memory import shared
from vapo_async.weights.vllm_plugin import SHARED_MEMORY

if TYPE_CHECKING:
    from vapo_async.collector.engine_vllm import VLLMEngine

VOCAB, EOS, MAX_LENGTH = 48, 1, 192
GONE_S = 10.0
"""A process that was told to end has to be gone by then."""


@contextmanager
def running_engine(
    policy: PreTrainedModel,
    folder: Path,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    **settings: object,
) -> "Iterator[VLLMEngine]":
    """An engine with ``policy``'s weights; when the block ends it is closed, and none of its processes is left."""
    policy.save_pretrained(folder)
    environment, others = dict(os.environ), engine_processes()
    try:
        prepare_vllm("cpu", 1)
        from vapo_async.collector.engine_vllm import VLLMEngine  # importing vLLM takes seconds

        engine = VLLMEngine(
            folder,
            VLLMEngineConfig(**({"max_slots": 8} | settings)),  # type: ignore[arg-type]
            eos_token_id=EOS,
            max_length=MAX_LENGTH,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            dtype="float32",
            share=shared,
            backend=SHARED_MEMORY,
        )
    finally:
        os.environ.clear()
        os.environ.update(environment)  # vLLM's process has its own by now
    mine = [process for process in engine_processes() if process not in others]
    assert len(mine) == 1
    try:
        yield engine
    finally:
        engine.close()
        _, alive = psutil.wait_procs(mine, timeout=GONE_S)
        assert not alive


def engine_processes(of: int | None = None) -> list[psutil.Process]:
    """Processes of vLLM's that the process ``of``, or this one, has started and that run."""
    found = []
    for process in psutil.Process(of).children(recursive=True):
        try:
            if process.name().startswith("VLLM::") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def versions_of_policy(count: int, *, tied: bool, family: str) -> list[PreTrainedModel]:
    """Random models that have nothing in common but their shape."""
    return [tiny_policy(VOCAB, tied=tied, family=family, seed=seed) for seed in range(count)]


def random_prompts(lengths: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def reference_log_probs(
    policy: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Response], temperature: float
) -> list[Tensor]:
    """Of every response's tokens by one full forward pass in float32 over all sequences, right-padded."""
    sequences = [[*prompt, *response.token_ids] for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(len(sequence) for sequence in sequences)
    tokens = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    with torch.no_grad():
        logits = policy(tokens, attention_mask=mask, use_cache=False).logits.float() / temperature
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return [
        log_probs[row, len(prompt) - 1 : len(sequence) - 1]
        for row, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True))
    ]


def run_all(engine: "VLLMEngine") -> list[Completion]:
    completions = []
    while engine.num_unfinished:
        completions += engine.step()
    return completions
