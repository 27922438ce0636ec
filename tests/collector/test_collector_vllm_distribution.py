"""Both engines sample from one distribution: chi-square tests of homogeneity on first tokens."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor
from transformers import TopPLogitsWarper
from vllm_runs import EOS, MAX_LENGTH, VOCAB, random_prompts, running_engine

from vapo_async.collector.engine import Engine, GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine

SAMPLES, UNLIKELY = 4096, 1e-4


def same_distribution_p(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The probability that counts are no more alike if, in each pair, one distribution made both.

    Args:
        pairs: of counts, [tokens] each; tokens that both together have fewer than ten of are taken as one.
    """
    statistic, degrees = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        counts = torch.stack(pair).double()
        rare = counts.sum(0) < 10
        counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], 1)
        counts = counts[:, counts.sum(0) > 0]
        expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
        statistic += ((counts - expected) ** 2 / expected).sum()
        degrees += counts.shape[1] - 1
    return float(torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), statistic / 2))


def test_p_values_are_the_chi_square_distributions() -> None:
    """2×2 and 2×3 counts worked by hand, with one and two degrees of freedom, and both together with three."""
    two = torch.tensor([60, 40]), torch.tensor([40, 60])  # each cell is 10 from 50: 4 · 100/50 = 8
    three = torch.tensor([30, 30, 40]), torch.tensor([20, 40, 40])  # 2 · (25/25 + 25/35) = 24/7
    assert same_distribution_p([(two[0], two[0])]) == 1
    assert same_distribution_p([two]) == pytest.approx(math.erfc(2), rel=1e-9)  # P(χ²₁ > x) = erfc(√(x/2))
    assert same_distribution_p([three]) == pytest.approx(math.exp(-12 / 7), rel=1e-9)  # P(χ²₂ > x) = exp(−x/2)
    half = (8 + 24 / 7) / 2  # P(χ²₃ > x) = erfc(√(x/2)) + 2 √(x/2π) exp(−x/2)
    expected = math.erfc(math.sqrt(half)) + 2 * math.sqrt(half / math.pi) * math.exp(-half)
    assert same_distribution_p([two, three]) == pytest.approx(expected, rel=1e-9)
    rare = torch.tensor([60, 0, 3, 40]), torch.tensor([40, 3, 0, 60])  # 3 of each kind, taken as one: no evidence
    assert 0.01 < same_distribution_p([rare]) / math.erfc(2) < 100
    assert same_distribution_p([(torch.tensor([50, 4]), torch.tensor([50, 4]))]) == 1


@pytest.mark.vllm
@pytest.mark.parametrize("top_p", [pytest.param(1.0, marks=pytest.mark.slow), 0.9])
def test_first_tokens_of_both_engines_have_one_distribution(top_p: float, tmp_path: Path) -> None:
    """4,096 samples of each of two prompts by each engine; the same test tells a temperature of 0.9 from 1.

    Log-probs are of the distribution that is sampled from, with a top-p below 1 too.
    """
    policy = tiny_policy(VOCAB, seed=7)
    prompts = [random_prompts([3], seed=26)[0], random_prompts([17], seed=54)[0]]  # whose tokens a temperature moves

    def first_tokens(engine: Engine, temperature: float) -> list[Tensor]:
        for i, prompt in enumerate(prompts):
            engine.submit(GenerationRequest(i, prompt, SAMPLES, 1))
        counts, found = torch.zeros(len(prompts), VOCAB, dtype=torch.long), torch.full((len(prompts), VOCAB), -math.inf)
        while engine.num_unfinished:
            for completion in engine.step():
                at = completion.request_id, completion.response.token_ids[0]
                counts[at] += 1
                found[at] = completion.response.log_probs[0]
        assert counts.sum(1).tolist() == [SAMPLES] * len(prompts)
        with torch.no_grad():
            logits = torch.stack([policy(torch.tensor([prompt])).logits[0, -1] / temperature for prompt in prompts])
        expected = (TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits).log_softmax(-1)
        torch.testing.assert_close(found, expected.where(counts > 0, -math.inf), atol=1e-4, rtol=0)
        return list(counts)

    def embedded(temperature: float, seed: int) -> list[Tensor]:
        engine = TransformersEngine(
            policy,
            eos_token_id=EOS,
            max_slots=512,
            max_length=MAX_LENGTH,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        return first_tokens(engine, temperature)

    with running_engine(policy, tmp_path, top_p=top_p, seed=5, max_slots=256) as engine:
        by_vllm = first_tokens(engine, 1.0)
    same, colder = (
        same_distribution_p(list(zip(by_vllm, embedded(temperature, seed), strict=True)))
        for temperature, seed in ((1.0, 5), (0.9, 6))
    )
    print(f"p of the same temperature {same:.2g}, of 0.9 {colder:.2g}")
    assert same > UNLIKELY > colder
    assert same_distribution_p([(by_vllm[0], by_vllm[1])]) < UNLIKELY
