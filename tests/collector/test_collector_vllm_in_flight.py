"""vLLM under weight updates: every token's log-prob is that of its stamped weights, by Hugging Face's word."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from vllm_runs import VOCAB, random_prompts, reference_log_probs, run_all, running_engine, versions_of_policy

from vapo_async.collector.engine import Completion, GenerationRequest
from vapo_async.config import KVCacheOnUpdate
from vapo_async.weights.mailbox import published_tensors

if TYPE_CHECKING:
    from vapo_async.collector.engine_vllm import VLLMEngine

UPDATES, TOLERANCE = 20, 1e-3


def explaining_versions(errors: Tensor, tolerance: float) -> list[set[int]]:
    """For each token the versions that it can have in some rising sequence of versions that explains all tokens.

    Args:
        errors: [versions, tokens], distance of a token's log-prob from each version's.
        tolerance: a version explains a token when it is nearer than this.
    """
    fits = errors < tolerance
    before = torch.zeros_like(fits)  # a rising sequence explains the tokens so far and ends here
    after = torch.zeros_like(fits)
    reachable = torch.ones(fits.shape[0], dtype=torch.bool)
    for token in range(fits.shape[1]):
        before[:, token] = fits[:, token] & reachable
        reachable = before[:, token].cummax(0).values
    reachable = torch.ones(fits.shape[0], dtype=torch.bool)
    for token in reversed(range(fits.shape[1])):
        after[:, token] = fits[:, token] & reachable
        reachable = after[:, token].flip(0).cummax(0).values.flip(0)
    return [set(column.nonzero()[:, 0].tolist()) for column in (before & after).T]


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_explaining_versions_are_those_of_all_rising_sequences(fits: list[list[bool]]) -> None:
    """Against trying them all: tokens down, versions across."""
    rising = [
        path
        for path in itertools.product(range(3), repeat=len(fits))
        if list(path) == sorted(path) and all(fits[token][version] for token, version in enumerate(path))
    ]
    expected = [{path[token] for path in rising} for token in range(len(fits))]
    assert explaining_versions((~torch.tensor(fits)).double().T, 0.5) == expected


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("family", "tied", "temperature"),
    [("qwen2", True, 1.0), pytest.param("llama", False, 0.9, marks=pytest.mark.slow)],
)
def test_every_token_is_of_its_stamped_weights_over_twenty_updates(
    family: str, tied: bool, temperature: float, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """One stream of requests, KV cache recomputed; the boundaries that log-probs show are the stamped ones."""
    policies = versions_of_policy(UPDATES + 1, tied=tied, family=family)
    prompts = random_prompts([*(1 + 3 * i for i in range(20)), 40, 40], seed=3)
    prompts[-1] = prompts[-2]  # the same one again, in other weights' days
    requests = [GenerationRequest(i, prompt, 1 + i % 3, 30 + 5 * i) for i, prompt in enumerate(prompts)]
    waiting = iter(requests)
    with running_engine(policies[0], tmp_path, temperature=temperature, max_slots=12) as engine:
        completions: list[Completion] = []
        for request in itertools.islice(waiting, 6):
            engine.submit(request)
        for version in range(1, UPDATES + 1):
            for _ in range(3):
                completions += engine.step()
            assert engine.num_unfinished, "every update has to meet responses in flight"
            engine.load_weights(version, published_tensors(policies[version]))
            for request in itertools.islice(waiting, 1):
                engine.submit(request)
        completions += run_all(engine)
    assert len(completions) == sum(r.num_samples for r in requests)

    responses = [c.response for c in completions]
    of_prompts = [prompts[c.request_id] for c in completions]
    references = [reference_log_probs(policy, of_prompts, responses, temperature) for policy in policies]
    boundaries, found, crossings, worst, seen = 0, 0, 0, 0.0, set()
    for row, response in enumerate(responses):
        by_version = torch.stack([reference[row] for reference in references])
        errors = (torch.tensor(response.log_probs) - by_version).abs()
        stamped = torch.tensor(response.versions)
        worst = max(worst, float(errors.gather(0, stamped[None]).max()))
        seen |= set(response.versions)
        crossings += len(stamped.unique()) > 1
        explained = explaining_versions(errors, TOLERANCE)
        for token, versions in enumerate(explained):
            assert response.versions[token] in versions
            if token and response.versions[token - 1] != response.versions[token]:
                boundaries += 1
                found += len(versions) == 1 == len(explained[token - 1])
    told = f"{len(responses)} responses, {crossings} of several versions; {boundaries} boundaries, {found} found from "
    record_property("vllm_in_flight", told + f"log-probs alone; largest error {worst:.1e}")
    print(f"{family}: {told}log-probs alone; largest error {worst:.1e}")
    assert worst < TOLERANCE
    assert seen == set(range(UPDATES + 1))
    assert crossings >= 25 and boundaries >= 100
    assert found >= 0.95 * boundaries, "a boundary is found where one version alone explains the tokens on both sides"


@pytest.fixture(scope="module")
def policies() -> list[PreTrainedModel]:
    return versions_of_policy(3, tied=True, family="qwen2")


@pytest.fixture(scope="module")
def keeping(policies: list[PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> "Iterator[VLLMEngine]":
    folder = tmp_path_factory.mktemp("keeping")
    with running_engine(policies[0], folder, kv_cache_on_update=KVCacheOnUpdate.keep) as engine:
        yield engine


@pytest.mark.vllm
def test_kept_keys_give_the_mixture_and_new_responses_do_without_them(
    keeping: "VLLMEngine", policies: list[PreTrainedModel]
) -> None:
    """The reference decodes by Transformers' own cache and changes its weights where the stamps do."""
    prompt = random_prompts([70], seed=5)[0]  # two whole blocks of the cache
    keeping.submit(GenerationRequest(0, prompt, 4, 90))
    completions: list[Completion] = []
    for version in (1, 2):
        for _ in range(6):
            completions += keeping.step()
        keeping.load_weights(version, published_tensors(policies[version]))
    keeping.submit(GenerationRequest(1, prompt, 4, 40))
    completions += run_all(keeping)
    mixed = 0
    for completion in completions:
        response = completion.response
        log_probs = torch.tensor(response.log_probs)
        torch.testing.assert_close(log_probs, _mixture(policies, prompt, completion), atol=TOLERANCE, rtol=0)
        last = policies[response.versions[-1]]
        of_last = torch.tensor(response.versions) == response.versions[-1]
        full = (reference_log_probs(last, [prompt], [response], 1.0)[0] - log_probs).abs()[of_last]
        if completion.request_id == 1:
            assert bool(of_last.all()) and response.versions[0] == 2
            assert full.max() < TOLERANCE, "the prompt's old keys have another salt"
        elif response.versions[0] != response.versions[-1]:
            mixed += 1
            assert full.max() > 100 * TOLERANCE, "kept and recomputed must differ here"
    assert mixed >= 2


def _mixture(policies: list[PreTrainedModel], prompt: tuple[int, ...], completion: Completion) -> Tensor:
    cache, log_probs = None, []
    feed = torch.tensor([prompt])
    for token, version in zip(completion.response.token_ids, completion.response.versions, strict=True):
        with torch.no_grad():
            out = policies[version](feed, past_key_values=cache, use_cache=True)
        assert out.logits.shape[-1] == VOCAB
        cache = out.past_key_values
        log_probs.append(float(out.logits[0, -1].log_softmax(-1)[token]))
        feed = torch.tensor([[token]])
    return torch.tensor(log_probs)
