"""DeepSpeed's ranks learn what one process of plain torch learns: the same losses, parameters, checkpoints."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from rank_processes import in_ranks
from tensordict import TensorDict
from test_learner_learner import ALGORITHM, VOCAB, assert_close, make_batch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from vapo_async.checkpoint import POLICY_FOLDER
from vapo_async.config import DeepSpeedLearnerConfig
from vapo_async.config.algorithm import AlgorithmConfig, ImportanceKind
from vapo_async.learner.backend import Schedule
from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import Learner
from vapo_async.learner.models import Critic, policy_log_probs
from vapo_async.learner.ranks import OneRank, Ranks
from vapo_async.models.char_tokenizer import build_char_tokenizer

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

STAGES = (1, 2, 3)
FIVE_STEPS = dataclasses.replace(ALGORITHM, minibatches=5, kl_coef=0.01, lr_warmup_steps=3)
ROOM = 16_384
Found = tuple[list[dict[str, float]], dict[str, Tensor]]
"""Metrics of each batch, and all parameters."""


def make_learner(
    ranks: Ranks,
    stage: int | None,
    algorithm: AlgorithmConfig = FIVE_STEPS,
    *,
    tied: bool = True,
    max_tokens: int = ROOM,
    packing: bool = True,
    kept: int = 1,
    dtype: torch.dtype = torch.float32,
    rounded: bool = False,
    **settings: Any,
) -> Learner:
    """``stage=None``: plain torch. ``rounded``: the weights are such that bfloat16 has them exactly."""
    config = DeepSpeedLearnerConfig(
        ranks=ranks.size,
        zero_stage=stage or 1,
        max_tokens_per_microbatch=max_tokens,
        packing=packing,
        mismatch_versions=kept,
        **settings,
    )
    policy = tiny_policy(VOCAB, tied=tied).to(dtype)
    if rounded:
        policy = policy.bfloat16().to(dtype)
    options: dict[str, Any] = {}
    if stage is not None:
        from vapo_async.learner.backend_deepspeed import DeepSpeedBackend

        def backend(module: nn.Module, schedule: Schedule, prefix: str) -> DeepSpeedBackend:
            return DeepSpeedBackend(module, schedule, config, ranks, prefix)

        options = {"ranks": ranks, "make_backend": backend}
    return Learner(algorithm, config, policy, Critic.from_policy(policy), temperature=1.0, seed=0, **options)


def parameters_of(learner: Learner) -> dict[str, Tensor]:
    """Policy and critic, whole."""
    assert learner.critic_backend is not None
    return {
        f"{kind}/{name}": p.detach().cpu().clone()
        for kind, backend in (("policy", learner.policy_backend), ("critic", learner.critic_backend))
        for name, p in backend.parameters()
    }


def learned(learner: Learner, batches: Sequence[list[TensorDict]], first: int = 0) -> Found:
    """``first``: the policy's version at the first batch."""
    metrics = [learner.update(batch, version).metrics for version, batch in enumerate(batches, first)]
    return metrics, parameters_of(learner)


def by_stage(ranks: Ranks, tied: bool) -> dict[int, Found]:
    return {stage: learned(make_learner(ranks, stage, tied=tied), [make_batch()]) for stage in STAGES}


def assert_same_metrics(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("size", "tied"), [pytest.param(1, True, marks=pytest.mark.slow), (2, True), (2, False)])
def test_all_stages_learn_what_plain_torch_learns(size: int, tied: bool) -> None:
    """Five optimizer steps of policy and critic each, a KL to the base among the losses."""
    metrics, parameters = learned(make_learner(OneRank(), None, tied=tied), [make_batch()])
    start = parameters_of(make_learner(OneRank(), None, tied=tied))
    assert max(float((parameters[name] - start[name]).abs().max()) for name in start) > 1e-3
    for of_rank in in_ranks(size, by_stage, tied):
        for stage, (its_metrics, its_parameters) in of_rank.items():
            assert stage in STAGES
            assert_same_metrics(its_metrics, metrics)
            assert_close(its_parameters, parameters, atol=1e-5)


def cut_differently(ranks: Ranks) -> list[Found]:
    cuts = [(ROOM, True), (ROOM, False), (120, True), (120, False), (40, False)]
    algorithm = dataclasses.replace(FIVE_STEPS, minibatches=1, importance=ImportanceKind.m2po)
    return [
        learned(make_learner(ranks, 3, algorithm, max_tokens=tokens, packing=packing), [make_batch()])
        for tokens, packing in cuts
    ]


def test_no_cut_changes_a_loss() -> None:
    """Passes of all rows, of some and of hardly more than one; padded and packed; over one rank and over two."""
    found = [one for size in (1, 2) for one in in_ranks(size, cut_differently)[0]]
    losses = [{k: v for k, v in metrics[0].items() if k.startswith("loss")} for metrics, _ in found]
    assert {"loss_objective", "loss_nll", "loss_kl", "loss_critic"} <= losses[0].keys()
    for other in losses[1:]:
        for name, value in losses[0].items():
            assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    for _, parameters in found[1:]:
        assert_close(parameters, found[0][1], atol=1e-5)


def few_rows(ranks: Ranks) -> Found:
    """Fewer rows than ranks in the last mini-batches."""
    algorithm = dataclasses.replace(FIVE_STEPS, minibatches=3)
    return learned(make_learner(ranks, 3, algorithm), [make_batch(groups=1)])


def test_a_rank_without_rows_takes_part() -> None:
    (metrics, parameters), (_, others) = in_ranks(2, few_rows)
    algorithm = dataclasses.replace(FIVE_STEPS, minibatches=3)
    expected = learned(make_learner(OneRank(), None, algorithm), [make_batch(groups=1)])
    assert_same_metrics(metrics, expected[0])
    assert_close(parameters, expected[1], atol=1e-5)
    assert_close(parameters, others, atol=0)


def older_policies(ranks: Ranks) -> tuple[list[dict[str, float]], int]:
    learner = make_learner(ranks, 3, kept=2)
    batches = [make_batch(seed) for seed in range(3)]
    metrics, _ = learned(learner, batches)
    held = sum(part.numel() for policy in learner._mismatch.kept for part in policy.snapshot or ())
    return metrics, held


def test_older_policies_are_kept_in_parts_and_score_the_same() -> None:
    """All tokens are of version 0, so from the second batch on it is an older policy that they are compared with."""
    learner = make_learner(OneRank(), None, kept=2)
    expected, _ = learned(learner, [make_batch(seed) for seed in range(3)])
    assert expected[2]["engine_mismatch_tokens"] > 0
    whole = sum(part.numel() for policy in learner._mismatch.kept for part in policy.snapshot or ())
    for metrics, held in in_ranks(2, older_policies):
        for one, other in zip(metrics, expected, strict=True):
            found = {name: value for name, value in other.items() if name.startswith("engine_mismatch")}
            assert {name: one[name] for name in found} == pytest.approx(found, rel=1e-3)
        assert held <= whole // 2 + 2 * 2 * len(list(learner.policy.parameters()))  # each part is rounded up


def save_and_go_on(ranks: Ranks, stage: int, folder: Path) -> Found:
    learner = make_learner(ranks, stage, kept=0)  # older policies are in no checkpoint
    learned(learner, [make_batch()])
    save_learner(learner, build_char_tokenizer(), folder)
    return learned(learner, [make_batch(1)], first=1)


def load_and_go_on(ranks: Ranks, stage: int, folder: Path) -> Found:
    learner = make_learner(ranks, stage, kept=0)
    load_learner(learner, folder)
    return learned(learner, [make_batch(1)], first=1)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ((2, 3), (1, 1)),
        ((1, None), (2, 3)),
        pytest.param((1, 2), (2, 3), marks=pytest.mark.slow),
        pytest.param((2, 2), (1, None), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_with_other_ranks_and_stages(
    written: tuple[int, int | None], read: tuple[int, int | None], tmp_path: Path
) -> None:
    """(ranks, stage); None is plain torch."""

    def run(work: Any, ranks: int, stage: int | None) -> Found:
        if stage is None:
            found: Found = work(OneRank(), stage, tmp_path)
        else:
            found = in_ranks(ranks, work, stage, tmp_path)[0]
        return found

    metrics, parameters = run(save_and_go_on, *written)
    its_metrics, its_parameters = run(load_and_go_on, *read)
    assert_same_metrics(its_metrics, metrics)
    assert_close(its_parameters, parameters, atol=1e-5)


def save(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    learner = make_learner(ranks, 3)
    learned(learner, [make_batch()])
    save_learner(learner, build_char_tokenizer(), folder)
    return parameters_of(learner)


def test_the_policys_folder_is_hugging_faces(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Written in two shares; equal log-probs."""
    saved = in_ranks(2, save, tmp_path)[0]
    assert len(list((tmp_path / POLICY_FOLDER).glob("*.safetensors"))) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / POLICY_FOLDER).eval()
    own = tiny_policy(VOCAB)
    with torch.no_grad():
        for name, p in own.named_parameters():
            p.copy_(saved[f"policy/{name}"])
    tokens = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    one, other = (
        policy_log_probs(policy, tokens, mask, temperature=1.0, chunk_tokens=64)[0] for policy in (own, loaded)
    )
    assert torch.equal(one, other)
