"""Held-out generation with fixed weights: every problem k times."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vapo_async.collector.engine import Engine, GenerationRequest
from vapo_async.schema import FinishReason, Response


@dataclass(frozen=True)
class SampledResponses:
    """k decoded responses to one prompt, with their lengths in tokens and whether the limit cut them."""

    texts: list[str]
    lengths: list[int]
    truncated: list[bool]


class Evaluator:
    """Generates ``samples`` responses for each prompt with an engine of its own, so that training is not disturbed.

    Every evaluation starts from ``seed``: the same weights give the same numbers whenever they are evaluated. The
    engine's log-probs end here: they are of ``evaluation.temperature`` and ``.top_p``, which no learner knows of.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, *, max_response_tokens: int, seed: int
    ) -> None:
        self._engine, self._seed = engine, seed
        self._tokenizer = tokenizer
        self._max_response_tokens = max_response_tokens

    def load_weights(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        self._engine.load_weights(version, tensors)

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def sample(self, prompts: Sequence[tuple[int, ...]], samples: int) -> list[SampledResponses]:
        """Responses in the order of the prompts."""
        done = dict(self.stream(prompts, samples))
        return [done[i] for i in range(len(prompts))]

    def stream(self, prompts: Sequence[tuple[int, ...]], samples: int) -> Iterator[tuple[int, SampledResponses]]:
        """(a prompt's place, its responses) as soon as all ``samples`` of them are there."""
        self._engine.seed(self._seed)
        for i, token_ids in enumerate(prompts):
            self._engine.submit(GenerationRequest(i, token_ids, samples, self._max_response_tokens))
        responses: list[list[Response]] = [[] for _ in prompts]
        while self._engine.num_unfinished:
            for completion in self._engine.step():
                row = responses[completion.request_id]
                row.append(completion.response)
                if len(row) == samples:
                    yield completion.request_id, self._decoded(sorted(row, key=lambda r: r.sample_index))

    def _decoded(self, row: list[Response]) -> SampledResponses:
        return SampledResponses(
            self._tokenizer.batch_decode([r.token_ids for r in row], skip_special_tokens=True),
            [len(r.token_ids) for r in row],
            [r.finish_reason is FinishReason.LENGTH for r in row],
        )
