"""vLLM as an engine: what the contract in ``collector/engine.py`` promises, by Hugging Face's word on the log-probs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel
from vllm_runs import EOS, MAX_LENGTH, random_prompts, reference_log_probs, run_all, running_engine, versions_of_policy

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.config import RunError
from vapo_async.schema import FinishReason, Response
from vapo_async.weights.mailbox import published_tensors
from vapo_async.weights.shared_memory import shared

if TYPE_CHECKING:
    from vapo_async.collector.engine_vllm import VLLMEngine

pytestmark = pytest.mark.vllm
TEMPERATURE, TOLERANCE = 0.7, 1e-4
ABORTED, LENGTH, STOP = FinishReason.ABORTED, FinishReason.LENGTH, FinishReason.STOP
PROMPTS = random_prompts([1, 5, 12, 31, 32, 33, 70], seed=1)
POLICIES = versions_of_policy(2, tied=True, family="qwen2")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[VLLMEngine]":
    """Idle, and with the first policy's weights, whenever a test begins."""
    with running_engine(POLICIES[0], tmp_path_factory.mktemp("engine"), temperature=TEMPERATURE) as engine:
        yield engine


@pytest.fixture(autouse=True)
def idle(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        assert engine.num_unfinished == 0 and engine.step() == []
        engine.load_weights(engine.version + 1, published_tensors(POLICIES[0]))


def assert_scored(policy: PreTrainedModel, completions: Sequence[Completion], *, since: Sequence[int] = ()) -> None:
    """Log-probs are ``policy``'s by a full forward pass, of token ``since[i]`` of the i-th response and those after."""
    prompts = [PROMPTS[c.request_id % len(PROMPTS)] for c in completions]
    responses = [c.response for c in completions]
    expected = reference_log_probs(policy, prompts, responses, TEMPERATURE)
    for response, log_probs, start in zip(responses, expected, since or [0] * len(responses), strict=True):
        found = torch.tensor(response.log_probs)
        torch.testing.assert_close(found[start:], log_probs[start:], atol=TOLERANCE, rtol=0)


def samples_in(completions: Sequence[Completion]) -> list[tuple[int, int]]:
    return sorted((c.request_id, c.response.sample_index) for c in completions)


def test_every_sample_comes_back_once_with_its_reason_and_its_log_probs(engine: "VLLMEngine") -> None:
    before = engine.generated_tokens
    requests = [GenerationRequest(i, prompt, 6, (1, 3, 100)[i % 3]) for i, prompt in enumerate(PROMPTS)]
    for request in requests:
        engine.submit(request)
    assert engine.num_unfinished == 42 > engine.capacity == 8
    completions = run_all(engine)
    assert samples_in(completions) == [(i, sample) for i in range(7) for sample in range(6)]
    assert_scored(POLICIES[0], completions)
    for completion in completions:
        response, limit = completion.response, requests[completion.request_id].max_new_tokens
        assert response.finish_reason is (STOP if response.token_ids[-1] == EOS else LENGTH)
        assert EOS not in response.token_ids[:-1]
        assert (
            len(response.token_ids) == limit if response.finish_reason is LENGTH else len(response.token_ids) <= limit
        )
        assert response.versions == [engine.version] * len(response.token_ids)
    assert {c.response.finish_reason for c in completions} == {STOP, LENGTH}, "the test wants both kinds"
    assert engine.generated_tokens - before == sum(len(c.response.token_ids) for c in completions)


def test_samples_of_a_prompt_share_its_whole_blocks_until_the_weights_change(engine: "VLLMEngine") -> None:
    """vLLM's own count of prompt tokens that it did not compute; a block is of 32."""
    prompt = random_prompts([70], seed=21)[0]  # few responses to it end at once: those are not seen here

    def cached() -> list[int]:
        engine.submit(GenerationRequest(0, prompt, 4, 100))
        found: dict[str, int] = {}
        while engine.num_unfinished and len(found) < 4:
            engine.step()
            samples = engine._process._llm.output_processor.request_states
            found |= {name: s.num_cached_tokens for name, s in samples.items() if not s.is_prefilling}
        engine.abort(0)
        return sorted(found.values())

    first, again = cached(), cached()
    assert first in ([0, 64, 64, 64], [0, 64, 64]) and set(again) == {64}
    engine.load_weights(engine.version + 1, published_tensors(POLICIES[1]))
    assert cached() in ([0, 64, 64, 64], [0, 64, 64])


def test_the_cache_holds_all_slots_at_full_length_and_one_more(engine: "VLLMEngine") -> None:
    """As vLLM counts it once it has started."""
    cache = engine._process._llm.vllm_config.cache_config
    assert cache.block_size == 32 and cache.num_gpu_blocks == (engine.capacity + 1) * MAX_LENGTH // 32


def test_an_abort_gives_back_what_there_is_and_frees_the_engine(engine: "VLLMEngine") -> None:
    for i in (3, 4):
        engine.submit(GenerationRequest(i, PROMPTS[i], 4, 120))
    early = [c for _ in range(6) for c in engine.step()]
    aborted = engine.abort(3)
    assert samples_in([c for c in early + aborted if c.request_id == 3]) == [(3, i) for i in range(4)]
    cut = [c for c in aborted if c.response.finish_reason is ABORTED]
    assert cut and all(len(c.response.token_ids) < 120 and EOS not in c.response.token_ids for c in cut)
    assert max(len(c.response.token_ids) for c in cut) >= 2
    assert_scored(POLICIES[0], aborted)
    assert engine.abort(3) == [] == engine.abort(99), "twice, and of a request that never was"
    rest = run_all(engine)
    assert samples_in([c for c in early + rest if c.request_id == 4]) == [(4, i) for i in range(4)]
    before = engine.generated_tokens
    engine.submit(GenerationRequest(3, PROMPTS[3], 2, 30))  # the same number again
    again = run_all(engine)
    assert samples_in(again) == [(3, 0), (3, 1)]
    assert engine.generated_tokens - before == sum(len(c.response.token_ids) for c in again), "nothing else ran"
    assert_scored(POLICIES[0], again)


def test_an_abort_right_after_submit_gives_back_all_samples(engine: "VLLMEngine") -> None:
    for i in range(20):  # as fast as it goes: whether vLLM has begun does not matter
        engine.submit(GenerationRequest(i, PROMPTS[i % 7], 3, 120))
        aborted = engine.abort(i)
        assert samples_in(aborted) == [(i, 0), (i, 1), (i, 2)]
        assert {c.response.finish_reason for c in aborted} == {ABORTED}
        assert engine.num_unfinished == 0


def test_partial_copies_and_lets_generation_go_on(engine: "VLLMEngine") -> None:
    """Over an update: what is there now is the beginning of what ends later."""
    engine.submit(GenerationRequest(5, PROMPTS[5], 10, 100))  # two wait for a slot
    before = engine.generated_tokens
    completions = [c for _ in range(5) for c in engine.step()]
    first = engine.partial(5)
    engine.load_weights(engine.version + 1, published_tensors(POLICIES[1]))
    completions += [c for _ in range(5) for c in engine.step()]
    second = engine.partial(5)
    assert engine.partial(98) == []
    samples = [*(r.sample_index for r in second), *(c.response.sample_index for c in completions)]
    assert sorted(samples) == list(range(10)), "each is either there or back"
    kept = {c.response.sample_index: replace(c.response) for c in completions}
    parts = [(replace(r, token_ids=tuple(r.token_ids)), list(r.log_probs), list(r.versions)) for r in first + second]
    for response in first + second:  # they are the caller's
        response.token_ids.append(-1)
        response.log_probs.clear()
        response.versions.append(-1)
    completions += run_all(engine)
    done = {c.response.sample_index: c.response for c in completions}
    assert len(completions) == len(done) == 10 and all(done[i].token_ids == r.token_ids for i, r in kept.items())
    for part, log_probs, versions in parts:
        whole, length = done[part.sample_index], len(part.token_ids)
        assert part.token_ids == tuple(whole.token_ids[:length])
        assert log_probs == whole.log_probs[:length] and versions == whole.versions[:length]
        if part.finish_reason is not ABORTED:
            assert length == len(whole.token_ids)
    assert any(versions and versions[0] < versions[-1] for _, _, versions in parts), "some part has to span the update"
    assert min(len(part.token_ids) for part, _, _ in parts) == 0, "those that wait have no token yet"
    assert engine.generated_tokens - before == sum(len(r.token_ids) for r in done.values())


def test_carried_responses_are_gone_on_with_by_new_weights(engine: "VLLMEngine") -> None:
    limit, old = 60, engine.version
    for i in (2, 5):
        engine.submit(GenerationRequest(i, PROMPTS[i], 3, limit))
    done = [c for _ in range(8) for c in engine.step()]
    cut = {i: engine.abort(i) for i in (2, 5)}
    engine.load_weights(old + 1, published_tensors(POLICIES[1]))
    parts = {(i, c.response.sample_index): c.response for i, aborted in cut.items() for c in aborted}
    for i, aborted in cut.items():
        finished = [c.response for c in done if c.request_id == i]
        carried = (*(c.response for c in aborted), *finished)
        engine.submit(GenerationRequest(i, PROMPTS[i], 3, limit, carried))
    before = engine.generated_tokens
    completions = run_all(engine)
    assert samples_in(completions) == [(i, sample) for i in (2, 5) for sample in range(3)]
    since = []
    for completion in completions:
        response = completion.response
        part = parts.get((completion.request_id, response.sample_index), response)
        since.append(len(part.token_ids))
        assert response.token_ids[: since[-1]] == part.token_ids
        assert response.log_probs[: since[-1]] == part.log_probs
        assert response.versions == [old] * since[-1] + [old + 1] * (len(response.token_ids) - since[-1])
        assert len(response.token_ids) == limit or response.finish_reason is STOP
    assert_scored(POLICIES[1], completions, since=since)
    new = sum(len(c.response.token_ids) - n for c, n in zip(completions, since, strict=True))
    assert engine.generated_tokens - before == new >= 6, "no token is made twice"


def test_finished_carried_ones_come_with_the_next_step_and_cost_no_token(engine: "VLLMEngine") -> None:
    stopped = Response(0, [5, EOS], [-0.5, -0.25], [3, 4], STOP)
    at_limit = Response(1, [5, 6, 7], [-1.0, -2.0, -3.0], [3, 3, 4], ABORTED)
    at_end = Response(2, [6, EOS], [-1.0, -0.5], [3, 3], ABORTED)
    cut = Response(3, [5, 6, 7], [-1.0, -2.0, -3.0], [3, 3, 4], LENGTH)
    before = engine.generated_tokens
    request = GenerationRequest(1, PROMPTS[1], 4, 3, (stopped, at_end, at_limit, cut))
    expected = [stopped, replace(at_limit, finish_reason=LENGTH), replace(at_end, finish_reason=STOP), cut]
    engine.submit(request)
    assert sorted(engine.partial(1), key=lambda r: r.sample_index) == expected
    assert engine.num_unfinished == 4
    got = sorted((c.response for c in engine.step()), key=lambda r: r.sample_index)
    assert got == expected and got[0].token_ids is not stopped.token_ids
    engine.submit(request)
    assert len(engine.abort(1)) == 4 and engine.generated_tokens == before


def test_a_response_fills_the_engine_to_its_last_token(engine: "VLLMEngine") -> None:
    prompt = PROMPTS[2]
    limit = MAX_LENGTH - len(prompt)
    carried = Response(0, [5] * (limit - 1), [-1.0] * (limit - 1), [0] * (limit - 1), ABORTED)
    engine.submit(GenerationRequest(2, prompt, 1, limit, (carried,)))
    (completion,) = run_all(engine)
    assert len(completion.response.token_ids) == limit
    assert_scored(POLICIES[0], [completion], since=[limit - 1])
    with pytest.raises(ValueError, match=f"needs {MAX_LENGTH + 1} tokens"):
        engine.submit(GenerationRequest(2, prompt, 1, limit + 1))
    with pytest.raises(ValueError, match="empty prompt"):
        engine.submit(GenerationRequest(2, (), 1, 8))
    with pytest.raises(ValueError, match="expected each sample_index once"):
        engine.submit(
            GenerationRequest(2, prompt, 2, 8, (replace(carried, token_ids=[], log_probs=[], versions=[]),) * 2)
        )
    assert engine.num_unfinished == 0, "refused requests queue nothing"


def test_a_version_without_weights_labels_the_tokens_after_it(engine: "VLLMEngine") -> None:
    old = engine.version
    engine.submit(GenerationRequest(4, PROMPTS[4], 8, 100))
    completions = [c for _ in range(5) for c in engine.step()]
    engine.load_weights(old + 7, None)
    assert engine.version == old + 7
    completions += run_all(engine)
    versions = [c.response.versions for c in completions]
    assert all(v == sorted(v) for v in versions) and {x for v in versions for x in v} == {old, old + 7}
    assert any(v[0] < v[-1] for v in versions)
    assert_scored(POLICIES[0], completions)
    with pytest.raises(ValueError, match=f"holds version {old + 7}, was given the older version {old + 6}"):
        engine.load_weights(old + 6, None)


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, rf"missing \['{NORM}'\], unexpected \[\]"),
        ({QUERY: None}, rf"missing \['{QUERY}'\]"),  # vLLM would take it, with what lies in memory for the queries
        ({"no.such.weight": torch.zeros(2)}, r"unexpected \['no.such.weight'\]"),
        ({QUERY: torch.zeros(3, 64)}, rf"of another shape \['{QUERY}'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    engine: "VLLMEngine", change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {**published_tensors(POLICIES[1]), **change}
    version = engine.version
    engine.submit(GenerationRequest(4, PROMPTS[4], 4, 60))
    early = engine.step()
    with pytest.raises(ValueError, match=message) as caught:
        engine.load_weights(version + 1, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert "\n" not in str(caught.value) and engine.version == version
    assert_scored(POLICIES[0], early + run_all(engine))


def test_after_an_update_that_failed_in_vllm_the_next_one_repairs(
    engine: "VLLMEngine", capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = published_tensors(POLICIES[1])
    engine.submit(GenerationRequest(6, PROMPTS[6], 4, 60))
    early = engine.step()
    old = engine.version
    with pytest.raises(RunError, match=rf"did not take the weights of version {old + 1}: .*No such file") as caught:
        engine._process.load({"path": "/no/such/file"}, old + 1, clear_cache=True)
    with (
        shared({name: tensor for name, tensor in tensors.items() if name != NORM}) as path,
        pytest.raises(RunError, match=rf"lack 1 of the engine's parameters: \['{NORM}'\]") as incomplete,
    ):
        engine._process.load({"path": path}, old + 1, clear_cache=True)
    assert all("\n" not in str(error.value) for error in (caught, incomplete))
    assert engine.version == old
    engine.load_weights(old + 1, tensors)
    completions = early + run_all(engine)
    assert {version for c in completions for version in c.response.versions} == {old, old + 1}
    since = [c.response.versions.count(old) for c in completions]
    assert_scored(POLICIES[1], completions, since=since)
    capfd.readouterr()  # vLLM's log of the two


def test_one_sample_after_the_same_seed_is_the_same(engine: "VLLMEngine") -> None:
    def drawn(seed: int) -> list[int]:
        engine.seed(seed)
        engine.submit(GenerationRequest(1, PROMPTS[1], 1, 40))
        return run_all(engine)[0].response.token_ids

    assert drawn(2**63 - 5) == drawn(2**63 - 5) and len({tuple(drawn(seed)) for seed in range(5)}) >= 4


def test_greedy_tokens_are_the_likeliest_and_do_not_depend_on_cuts(tmp_path: Path) -> None:
    """Log-probs are 0, those of the only token that there is."""
    limit = 40
    with running_engine(POLICIES[0], tmp_path, temperature=0.0) as engine:

        def submitted(*carried: Response) -> list[Completion]:
            engine.submit(GenerationRequest(5, PROMPTS[5], 2, limit, carried))
            return run_all(engine)

        uncut = [c.response for c in submitted()]
        assert len(uncut) == 2 and uncut[0].token_ids == uncut[1].token_ids
        response = uncut[0]
        with torch.no_grad():
            logits = POLICIES[0](torch.tensor([[*PROMPTS[5], *response.token_ids]])).logits[0, len(PROMPTS[5]) - 1 : -1]
        assert response.token_ids == logits.argmax(-1).tolist()
        assert response.log_probs == [0.0] * len(response.token_ids)
        assert len(response.token_ids) == limit or response.token_ids[-1] == EOS
        for steps in (1, 2, 9):
            engine.submit(GenerationRequest(5, PROMPTS[5], 2, limit))
            done = [c for _ in range(steps) for c in engine.step()]
            cut = [c.response for c in done + engine.abort(5)]
            again = [c.response for c in submitted(*cut)]
            assert [r.token_ids for r in again] == [response.token_ids] * 2
            assert all(r.log_probs == response.log_probs for r in again)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=6))
def test_versions_of_spans_are_one_per_token(parts: list[tuple[int, int]]) -> None:
    """Rising versions by what they rise, and how many tokens each has."""
    from vapo_async.collector.engine_vllm import versions_of

    spans, expected, version = [], [], 0
    for rise, tokens in parts:
        version += rise
        spans.append((str(version), len(expected), len(expected) + tokens))
        expected += [version] * tokens
    assert versions_of(spans, len(expected), version) == expected
    if expected:
        with pytest.raises(RuntimeError, match="do not fit"):
            versions_of([("0", 0, 0), *spans], len(expected), expected[-1] - 1)


@pytest.mark.parametrize(
    ("spans", "tokens", "message"),
    [
        ([("1", 1, 3)], 3, "do not fit 3 tokens"),  # a hole before
        ([("1", 0, 2), ("2", 3, 4)], 4, "do not fit 4 tokens"),  # a hole between
        ([("1", 0, 2), ("2", 1, 3)], 3, "do not fit 3 tokens"),  # twice the same token
        ([("1", 0, 2), ("2", 2, 1)], 1, "do not fit 1 tokens"),  # backwards
        ([("2", 0, 2), ("1", 2, 3)], 3, "do not fit 3 tokens"),  # versions that fall
        ([("1", 0, 2), ("5", 2, 3)], 3, "do not fit 3 tokens up to version 4"),
        ([("default", 0, 2)], 2, "do not fit 2 tokens"),  # vLLM's own label
        ([("-1", 0, 2)], 2, "do not fit 2 tokens"),
        ([("1", 0, 2)], 3, "cover 2 of 3 tokens"),
        ([("1", 0, 3)], 2, "cover 3 of 2 tokens"),
        ([], 1, "cover 0 of 1 tokens"),
    ],
)
def test_wrong_spans_are_refused(spans: list[tuple[str, int, int]], tokens: int, message: str) -> None:
    from vapo_async.collector.engine_vllm import versions_of

    with pytest.raises(RuntimeError, match=message):
        versions_of(spans, tokens, 4)
