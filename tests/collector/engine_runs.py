"""What the collector's tests share: a small engine, prompts for it, and Hugging Face's word on its log-probs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vapo_async.collector.engine import Completion
from vapo_async.collector.engine_transformers import TransformersEngine

VOCAB, EOS, TEMPERATURE = 18, 1, 0.8


def make_engine(policy: PreTrainedModel, **settings: object) -> TransformersEngine:
    defaults: dict[str, object] = {"eos_token_id": EOS, "max_slots": 5, "max_length": 64, "temperature": TEMPERATURE}
    return TransformersEngine(policy, **(defaults | settings))  # type: ignore[arg-type]


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()) for n in lengths]


def reference_log_probs(policy: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Of a full forward pass over the whole sequence, [len(response)]."""
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logits = policy(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
    return logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]


def run_all(engine: TransformersEngine) -> list[Completion]:
    completions = []
    while engine.num_unfinished:
        completions += engine.step()
    return completions
