"""Held-out generation with fixed weights: every problem k times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.engine import Engine, GenerationRequest
from vapo_async.schema import Response


@dataclass(frozen=True)
class SampledResponses:
    """k decoded responses to one prompt, with their lengths in tokens."""

    texts: list[str]
    lengths: list[int]


class Evaluator:
    """Generates ``samples`` responses for each prompt with an engine of its own, so that training is not disturbed."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, max_response_tokens: int) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_response_tokens = max_response_tokens

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        self._engine.load_weights(version, tensors)

    def sample(self, prompts: Sequence[tuple[int, ...]], samples: int) -> list[SampledResponses]:
        """Responses in the order of the prompts."""
        for i, token_ids in enumerate(prompts):
            self._engine.submit(GenerationRequest(i, token_ids, samples, self._max_response_tokens))
        responses: list[list[Response]] = [[] for _ in prompts]
        while self._engine.num_unfinished:
            for completion in self._engine.step():
                responses[completion.request_id].append(completion.response)
        out = []
        for row in responses:
            row.sort(key=lambda r: r.sample_index)
            texts = self._tokenizer.batch_decode([r.token_ids for r in row], skip_special_tokens=True)
            out.append(SampledResponses(texts, [len(r.token_ids) for r in row]))
        return out
