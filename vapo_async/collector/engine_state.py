"""The embedded engine's samples as a state: every request once, its samples as packed responses."""

from collections.abc import Mapping, Sequence

from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.samples import Sample
from vapo_async.responses import pack_responses, unpack_responses
from vapo_async.state import State, under


def pack_samples(samples: Mapping[str, Sequence[Sample]]) -> State:
    """Lists of samples by name. Samples of one request object share one again after :func:`unpack_samples`."""
    requests: dict[int, GenerationRequest] = {}
    for sample in (s for listed in samples.values() for s in listed):
        requests.setdefault(id(sample.request), sample.request)
    place = {key: i for i, key in enumerate(requests)}
    state = State(
        {
            "requests": [
                {
                    "request_id": request.request_id,
                    "prompt_token_ids": list(request.prompt_token_ids),
                    "num_samples": request.num_samples,
                    "max_new_tokens": request.max_new_tokens,
                }
                for request in requests.values()
            ],
            "samples": {},
        }
    )
    for name, listed in samples.items():
        packed = pack_responses([s.response for s in listed])
        state.data["samples"][name] = {"request": [place[id(s.request)] for s in listed], "response": packed.data}
        state.tensors |= packed.nested(name)
    return state


def unpack_samples(state: State) -> dict[str, list[Sample]]:
    """What :func:`pack_samples` packed."""
    requests = [
        GenerationRequest(r["request_id"], tuple(r["prompt_token_ids"]), r["num_samples"], r["max_new_tokens"])
        for r in state.data["requests"]
    ]
    return {
        name: [
            Sample(requests[place], response)
            for place, response in zip(
                listed["request"], unpack_responses(State(listed["response"], under(state.tensors, name))), strict=True
            )
        ]
        for name, listed in state.data["samples"].items()
    }
