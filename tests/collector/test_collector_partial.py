"""Responses in parts: cut, carried, gone on with by other weights; copies that disturb nothing; each one comes once."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import tiny_policy
from engine_runs import EOS, VOCAB, make_engine, prompts, reference_log_probs, run_all
from hypothesis import given, settings
from hypothesis import strategies as st

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import KVCacheOnUpdate
from vapo_async.schema import FinishReason, Response
from vapo_async.weights.mailbox import published_tensors

PROMPTS = prompts(4, seed=1)
WEIGHTS = [published_tensors(tiny_policy(VOCAB, seed=seed)) for seed in range(3)]
POLICIES = [tiny_policy(VOCAB, seed=seed) for seed in range(3)]
ABORTED, LENGTH, STOP = FinishReason.ABORTED, FinishReason.LENGTH, FinishReason.STOP


def submit_all(engine: TransformersEngine) -> None:
    for i, prompt in enumerate(PROMPTS):
        engine.submit(GenerationRequest(i, prompt, 2, 30 + i))


def by_sample(completions: list[Completion]) -> dict[tuple[int, int], Response]:
    return {(c.request_id, c.response.sample_index): c.response for c in completions}


@cache
def uncut_greedy() -> dict[tuple[int, int], Response]:
    engine = make_engine(POLICIES[0], temperature=0.0, max_slots=8)
    submit_all(engine)
    return by_sample(run_all(engine))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=8), slots=st.integers(1, 8))
def test_greedy_tokens_do_not_depend_on_cuts(cuts: list[tuple[int, int]], slots: int) -> None:
    """(steps, request to cut) any number of times, also the same one twice without a step between."""
    expected = uncut_greedy()
    engine = make_engine(POLICIES[0], temperature=0.0, max_slots=slots)
    submit_all(engine)
    completions: list[Completion] = []
    for count, request_id in cuts:
        completions += [c for _ in range(count) for c in engine.step()]
        finished = {c.response.sample_index for c in completions if c.request_id == request_id}
        carried = tuple(c.response for c in engine.abort(request_id))
        assert {r.sample_index for r in carried} == {0, 1} - finished
        done = tuple(r for (i, _), r in by_sample(completions).items() if i == request_id)
        completions = [c for c in completions if c.request_id != request_id]
        engine.submit(GenerationRequest(request_id, PROMPTS[request_id], 2, 30 + request_id, carried + done))
    completions += run_all(engine)
    assert len(completions) == 8 and by_sample(completions) == expected
    assert engine.generated_tokens == sum(len(r.token_ids) for r in expected.values()), "no token is made twice"


@settings(max_examples=12, deadline=None)
@given(points=st.lists(st.integers(0, 9), min_size=2, max_size=2), on_update=st.sampled_from(list(KVCacheOnUpdate)))
def test_carried_across_publications_every_token_is_its_own_weights(
    points: list[int], on_update: KVCacheOnUpdate
) -> None:
    """The cut part stays as it is; the new part is what a teacher-forced pass of the new weights gives."""
    engine = make_engine(tiny_policy(VOCAB, seed=0), kv_cache_on_update=on_update, temperature=0.8, max_slots=3)
    submit_all(engine)
    parts: dict[tuple[int, int], Response] = {}
    completions: list[Completion] = []
    for version, count in enumerate(points, start=1):
        completions += [c for _ in range(count) for c in engine.step()]
        done = by_sample(completions)
        cut = {i: tuple(c.response for c in engine.abort(i)) for i in range(len(PROMPTS))}
        parts |= {(i, r.sample_index): r for i, responses in cut.items() for r in responses}
        engine.load_weights(version, WEIGHTS[version])
        for i, prompt in enumerate(PROMPTS):
            carried = cut[i] + tuple(r for (request_id, _), r in done.items() if request_id == i)
            engine.submit(GenerationRequest(i, prompt, 2, 30 + i, carried))
        completions = []
    responses = by_sample(completions + run_all(engine))
    assert len(responses) == 8
    for (i, sample), response in responses.items():
        if (part := parts.get((i, sample))) is not None:
            n = len(part.token_ids)
            assert response.token_ids[:n] == part.token_ids
            assert response.log_probs[:n] == part.log_probs and response.versions[:n] == part.versions
            assert set(response.versions[n:]) <= {2, 1}
        versions = torch.tensor(response.versions)
        passes = torch.stack([reference_log_probs(policy, PROMPTS[i], response.token_ids) for policy in POLICIES])
        expected = passes.gather(0, versions[None])[0]
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=1e-5, rtol=0)


def test_finished_carried_ones_come_with_the_next_step_even_when_no_slot_is_free() -> None:
    engine = make_engine(tiny_policy(VOCAB), max_slots=1)
    engine.submit(GenerationRequest(0, PROMPTS[0], 1, 40))
    engine.step()
    stopped = Response(0, [5, EOS], [-0.5, -0.25], [3, 4], STOP)
    at_end = Response(2, [6, EOS], [-1.0, -0.5], [3, 3], ABORTED)
    at_limit = Response(1, [5, 6, 7], [-1.0, -2.0, -3.0], [3, 3, 4], ABORTED)
    cut = Response(3, [5, 6, 7], [-1.0, -2.0, -3.0], [3, 3, 4], LENGTH)
    engine.submit(GenerationRequest(9, PROMPTS[1], 4, 3, (stopped, at_end, at_limit, cut)))
    assert engine.num_unfinished == 5 and engine.generated_tokens == 1
    got = {c.response.sample_index: c.response for c in engine.step() if c.request_id == 9}
    assert got == {
        0: stopped,
        1: replace(at_limit, finish_reason=LENGTH),
        2: replace(at_end, finish_reason=STOP),
        3: cut,
    }
    assert all(got[i].token_ids is not r.token_ids for i, r in enumerate((stopped, at_limit, at_end, cut)))
    assert engine.generated_tokens == 2 and not [c for c in run_all(engine) if c.request_id == 9]


GOOD = Response(0, [5, 6], [-1.0, -1.0], [0, 0], ABORTED)


@pytest.mark.parametrize(
    ("carried", "message"),
    [
        ((replace(GOOD, sample_index=2),), r"sample 2: expected sample_index 0 … 1"),
        ((replace(GOOD, sample_index=-1),), r"sample -1: expected sample_index 0 … 1"),
        ((GOOD, GOOD), r"sample 0: expected each sample_index once"),
        ((replace(GOOD, log_probs=[-1.0]),), r"as many token_ids as log_probs and versions, found 2, 1, 2"),
        ((replace(GOOD, versions=[]),), r"as many token_ids as log_probs and versions, found 2, 2, 0"),
        ((Response(1, [5] * 5, [-1.0] * 5, [0] * 5, ABORTED),), r"sample 1: expected at most max_new_tokens=4 tokens"),
    ],
)
def test_wrong_carried_responses_are_refused_and_nothing_is_queued(carried: tuple[Response, ...], message: str) -> None:
    engine = make_engine(tiny_policy(VOCAB))
    with pytest.raises(ValueError, match=message):
        engine.submit(GenerationRequest(0, (2, 3), 2, 4, carried))
    assert engine.num_unfinished == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_partial_gives_copies_and_disturbs_nothing(temperature: float) -> None:
    alone, watched = (make_engine(tiny_policy(VOCAB), temperature=temperature, max_slots=3) for _ in range(2))
    submit_all(alone)
    submit_all(watched)
    completions: list[Completion] = []
    seen: dict[tuple[int, int], Response] = {}
    while watched.num_unfinished:
        for i in range(len(PROMPTS)):
            done = {c.response.sample_index for c in completions if c.request_id == i}
            partial = watched.partial(i)
            assert {r.sample_index for r in partial} == {0, 1} - done and {r.finish_reason for r in partial} <= {
                ABORTED
            }
            seen |= {(i, r.sample_index): Response(**vars(r)) for r in partial}
            copies = watched.partial(i)
            for response in copies:  # a caller's own
                response.token_ids.append(0)
                response.log_probs.clear()
        completions += watched.step()
    assert completions == run_all(alone)
    for key, response in by_sample(completions).items():
        n = len(seen[key].token_ids)
        assert n == len(response.token_ids) - 1, "the last look was one step before the end"
        assert response.token_ids[:n] == seen[key].token_ids and response.versions[:n] == seen[key].versions
    assert watched.partial(0) == watched.partial(77) == watched.abort(77) == []


OPERATIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 3)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["abort", "carry", "partial", "load", "swap"]), st.integers(0, 5)),
)


@settings(max_examples=40, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=25))
def test_each_sample_comes_back_exactly_once(operations: list[tuple[str, int]]) -> None:
    policy = tiny_policy(VOCAB, seed=0)
    engine = make_engine(policy, max_slots=4)
    requests: list[GenerationRequest] = []
    came: list[tuple[int, int]] = []

    def note(completions: list[Completion]) -> None:
        for completion in completions:
            came.append((completion.request_id, completion.response.sample_index))
            assert len(completion.response.token_ids) <= requests[completion.request_id].max_new_tokens

    for operation, number in operations:
        request = requests[number % len(requests)] if requests else None
        if operation == "submit":
            requests.append(GenerationRequest(len(requests), PROMPTS[number], number, 3 + 4 * number))
            engine.submit(requests[-1])
        elif operation == "step":
            note([c for _ in range(number) for c in engine.step()])
        elif operation == "load":
            state = engine.state_dict()
            version, engine = engine.version, make_engine(policy, max_slots=4, seed=number)
            engine.load_weights(version, None)
            engine.load_state_dict(state)
        elif operation == "swap":
            engine.load_weights(engine.version + 1, WEIGHTS[number % 3])
        elif request is not None and operation == "abort":
            note(engine.abort(request.request_id))
        elif request is not None and operation == "partial":
            engine.partial(request.request_id)
        elif request is not None and operation == "carry" and (left := engine.abort(request.request_id)):
            carried = tuple(c.response for c in left)
            here = {r.sample_index for r in carried}
            done = [i for i in range(request.num_samples) if i not in here]  # came back before: carried as finished
            extra = tuple(Response(i, [EOS], [0.0], [0], STOP) for i in done)
            came = [key for key in came if key not in {(request.request_id, i) for i in done}]
            engine.submit(replace(request, carried=carried + extra))
    note(run_all(engine))
    assert sorted(came) == [(r.request_id, i) for r in requests for i in range(r.num_samples)]
