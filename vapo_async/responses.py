"""Responses as a :class:`~vapo_async.state.State`, a few flat tensors however many there are; and copies of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from vapo_async.schema import FinishReason, Response
from vapo_async.state import State


def pack_responses(responses: Sequence[Response]) -> State:
    """``tokens`` int64, ``log_probs`` float32 and ``versions`` int32, [all tokens] each; the rest is JSON lists."""
    return State(
        {
            "sample_index": [r.sample_index for r in responses],
            "finish_reason": [int(r.finish_reason) for r in responses],
            "length": [len(r.token_ids) for r in responses],
        },
        {
            "tokens": torch.tensor([t for r in responses for t in r.token_ids], dtype=torch.int64),
            "log_probs": torch.tensor([p for r in responses for p in r.log_probs], dtype=torch.float32),
            "versions": torch.tensor([v for r in responses for v in r.versions], dtype=torch.int32),
        },
    )


def unpack_responses(state: State) -> list[Response]:
    """What :func:`pack_responses` packed; log-probs that are float32 numbers come back bit for bit."""
    tokens, log_probs, versions = (state.tensors[key].tolist() for key in ("tokens", "log_probs", "versions"))
    responses, start = [], 0
    for index, reason, length in zip(
        *(state.data[k] for k in ("sample_index", "finish_reason", "length")), strict=True
    ):
        span = slice(start, start + length)
        responses.append(Response(index, tokens[span], log_probs[span], versions[span], FinishReason(reason)))
        start += length
    return responses


def pack_by_ticket(responses: Mapping[int, Sequence[Response]]) -> State:
    """Responses of several tickets, as :func:`pack_responses` packs them; ``tickets`` says whose each one is."""
    state = pack_responses([response for found in responses.values() for response in found])
    state.data["tickets"] = [ticket_id for ticket_id, found in responses.items() for _ in found]
    return state


def unpack_by_ticket(state: State) -> dict[int, tuple[Response, ...]]:
    """What :func:`pack_by_ticket` packed; a ticket without responses is not in it."""
    responses: dict[int, tuple[Response, ...]] = {}
    for ticket_id, response in zip(state.data["tickets"], unpack_responses(state), strict=True):
        responses[ticket_id] = (*responses.get(ticket_id, ()), response)
    return responses


def copy_of(response: Response) -> Response:
    """Shares no list with ``response``."""
    return replace(
        response,
        token_ids=list(response.token_ids),
        log_probs=list(response.log_probs),
        versions=list(response.versions),
    )
