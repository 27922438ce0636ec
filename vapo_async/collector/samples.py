"""The samples of a request: one response each, new or carried along."""

from dataclasses import dataclass, replace

from vapo_async.collector.engine import GenerationRequest
from vapo_async.responses import copy_of
from vapo_async.schema import FinishReason, Response


@dataclass(frozen=True)
class Sample:
    """One response of a request that is not in flight: waiting with what it brought along, or finished."""

    request: GenerationRequest
    response: Response

    @property
    def length(self) -> int:
        """Tokens of prompt and response so far."""
        return len(self.request.prompt_token_ids) + len(self.response.token_ids)

    @property
    def limit(self) -> int:
        """Tokens of prompt and response at most."""
        return len(self.request.prompt_token_ids) + self.request.max_new_tokens


def samples_of(request: GenerationRequest, *, max_length: int, eos_token_id: int) -> list[Sample]:
    """All samples of a checked request, carried ones with copies of their tokens. ABORTED: to be generated.

    Raises:
        ValueError: prompt and limit exceed ``max_length``, the prompt is empty, or a carried response cannot be one of
            this request.
    """
    prompt, limit = len(request.prompt_token_ids), request.max_new_tokens
    if prompt + limit > max_length:
        raise ValueError(
            f"request {request.request_id} needs {prompt + limit} tokens (prompt {prompt} + "
            f"max_new_tokens {limit}), the engine holds {max_length}"
        )
    if not prompt:
        raise ValueError(f"request {request.request_id} has an empty prompt")
    carried: dict[int, Response] = {}
    for response in request.carried:
        index = response.sample_index
        lengths = [len(response.token_ids), len(response.log_probs), len(response.versions)]
        wrong = ""
        if not 0 <= index < request.num_samples:
            wrong = f"expected sample_index 0 … {request.num_samples - 1}"
        elif index in carried:
            wrong = "expected each sample_index once"
        elif len(set(lengths)) > 1:
            wrong = f"expected as many token_ids as log_probs and versions, found {', '.join(map(str, lengths))}"
        elif lengths[0] > limit:
            wrong = f"expected at most max_new_tokens={limit} tokens, found {lengths[0]}"
        if wrong:
            raise ValueError(f"request {request.request_id}, carried response of sample {index}: {wrong}")
        carried[index] = settled(copy_of(response), limit, eos_token_id)
    fresh = (carried.get(i, Response(i, [], [], [], FinishReason.ABORTED)) for i in range(request.num_samples))
    return [Sample(request, response) for response in fresh]


def settled(response: Response, limit: int, eos_token_id: int) -> Response:
    """One that was cut exactly where it would have ended gets the reason that it would have had."""
    if response.finish_reason is not FinishReason.ABORTED or not response.token_ids:
        return response
    if response.token_ids[-1] == eos_token_id:
        return replace(response, finish_reason=FinishReason.STOP)
    if len(response.token_ids) == limit:
        return replace(response, finish_reason=FinishReason.LENGTH)
    return response
