"""The embedded engine: log-probs, versions and KV cache under weight swaps, against Hugging Face in full."""

import pytest
import torch
from conftest import tiny_policy
from engine_runs import EOS, TEMPERATURE, VOCAB, make_engine, prompts, reference_log_probs, run_all

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.config import KVCacheOnUpdate
from vapo_async.schema import FinishReason
from vapo_async.weights.mailbox import published_tensors


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("llama", True)])
def test_log_probs_equal_a_full_forward_pass(family: str, tied: bool) -> None:
    policy = tiny_policy(VOCAB, tied=tied, family=family)
    engine = make_engine(policy)
    requests = [GenerationRequest(i, prompt, 3, 20 + i) for i, prompt in enumerate(prompts(7))]
    for request in requests:
        engine.submit(request)
    completions = run_all(engine)
    assert len(completions) == 21
    reasons = set()
    for completion in completions:
        request, response = requests[completion.request_id], completion.response
        reasons.add(response.finish_reason)
        expected = reference_log_probs(policy, request.prompt_token_ids, response.token_ids)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=2e-5, rtol=0)
        if response.finish_reason is FinishReason.LENGTH:
            assert len(response.token_ids) == request.max_new_tokens
        else:
            assert response.token_ids[-1] == EOS
        assert EOS not in response.token_ids[:-1]
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}, "the test wants both kinds"


@pytest.mark.parametrize("tied", [True, False])
def test_swapped_weights_in_flight_score_the_tokens_after_the_swap(tied: bool) -> None:
    """KV cache recomputed: every token's log-prob is that of a full pass with the weights of its stamped version."""
    policies = [tiny_policy(VOCAB, tied=tied, seed=seed) for seed in range(5)]
    engine = make_engine(tiny_policy(VOCAB, tied=tied, seed=0), kv_cache_on_update=KVCacheOnUpdate.recompute)
    requests = [GenerationRequest(i, prompt, 4, 40) for i, prompt in enumerate(prompts(6))]
    for request in requests:
        engine.submit(request)
    completions: list[Completion] = []
    for version in range(1, 5):
        for _ in range(7):
            completions += engine.step()
        engine.load_weights(version, published_tensors(policies[version]))
    completions += run_all(engine)
    mixed = 0
    for completion in completions:
        response, prompt = completion.response, requests[completion.request_id].prompt_token_ids
        versions = torch.tensor(response.versions)
        assert bool((versions.diff() >= 0).all())
        mixed += len(versions.unique()) > 1
        by_version = torch.stack([reference_log_probs(p, prompt, response.token_ids) for p in policies])
        expected = by_version.gather(0, versions[None])[0]
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, atol=2e-5, rtol=0)
    assert mixed >= 5, "responses have to cross a swap for the test to say anything"


def test_kept_kv_cache_scores_the_mixture_that_was_sampled_from() -> None:
    """Old keys, new weights: the reference decodes by Transformers' own cache, swapping at the same token."""
    old, new = tiny_policy(VOCAB, seed=0), tiny_policy(VOCAB, seed=1)
    engine = make_engine(tiny_policy(VOCAB, seed=0), kv_cache_on_update=KVCacheOnUpdate.keep)
    prompt = prompts(1, seed=3)[0]
    engine.submit(GenerationRequest(0, prompt, 1, 30))
    done = [c for _ in range(4) for c in engine.step()]
    assert not done
    engine.load_weights(1, published_tensors(new))
    response = run_all(engine)[0].response
    assert response.versions[:4] == [0] * 4
    assert set(response.versions[4:]) == {1}
    cache, expected = None, []
    feed = torch.tensor([prompt])
    for i, token in enumerate(response.token_ids):
        with torch.no_grad():
            out = (old if i < 4 else new)(feed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        expected.append(float((out.logits[0, -1] / TEMPERATURE).log_softmax(-1)[token]))
        feed = torch.tensor([[token]])
    torch.testing.assert_close(torch.tensor(response.log_probs), torch.tensor(expected), atol=2e-5, rtol=0)
    full = reference_log_probs(new, prompt, response.token_ids)[4:]
    assert (full - torch.tensor(response.log_probs[4:])).abs().max() > 1e-3, "kept and recomputed must differ here"


def test_sampling_follows_the_distribution() -> None:
    policy = tiny_policy(VOCAB, seed=2)
    engine = make_engine(policy, max_slots=512)
    prompt, samples = prompts(1, seed=5)[0], 4096
    engine.submit(GenerationRequest(0, prompt, samples, 1))
    first = torch.tensor([c.response.token_ids[0] for c in run_all(engine)])
    with torch.no_grad():
        expected = (policy(torch.tensor([prompt])).logits[0, -1] / TEMPERATURE).softmax(-1) * samples
    observed = torch.bincount(first, minlength=VOCAB).double()
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((VOCAB - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(degrees, statistic.double() / 2) > 1e-3  # the chi-square test's p-value


def test_same_seed_same_responses_whatever_else() -> None:
    def responses(seed: int) -> list[list[int]]:
        engine = make_engine(tiny_policy(VOCAB), seed=seed)
        for i, prompt in enumerate(prompts(5)):
            engine.submit(GenerationRequest(i, prompt, 2, 15))
        return [c.response.token_ids for c in run_all(engine)]

    assert responses(0) == responses(0)
    assert responses(0) != responses(1)


def test_abort_gives_back_what_there_is() -> None:
    engine = make_engine(tiny_policy(VOCAB), max_slots=3)
    for i, prompt in enumerate(prompts(2)):
        engine.submit(GenerationRequest(i, prompt, 3, 40))
    engine.step()
    aborted = engine.abort(0)
    assert sorted(c.response.sample_index for c in aborted) == [0, 1, 2]
    assert {c.response.finish_reason for c in aborted} <= {FinishReason.ABORTED}
    assert all(len(c.response.token_ids) == 1 for c in aborted)
    assert {c.request_id for c in run_all(engine)} == {1}


def test_wrong_requests_and_weights_are_refused_by_name() -> None:
    engine = make_engine(tiny_policy(VOCAB))
    with pytest.raises(ValueError, match="needs 70 tokens"):
        engine.submit(GenerationRequest(0, (2, 3), 1, 68))
    with pytest.raises(ValueError, match="empty prompt"):
        engine.submit(GenerationRequest(0, (), 1, 8))
    with pytest.raises(ValueError, match="unexpected"):
        engine.load_weights(1, {"no.such.weight": torch.zeros(1)})
    engine.load_weights(3, None)
    with pytest.raises(ValueError, match="older version 2"):
        engine.load_weights(2, None)
