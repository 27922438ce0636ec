"""What saves memory changes no result: offloading, activation checkpointing, bfloat16 with float32 masters."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import in_ranks
from test_learner_deepspeed import FIVE_STEPS, STAGES, Found, assert_same_metrics, learned, make_learner, parameters_of
from test_learner_learner import assert_close, make_batch
from torch import Tensor

from vapo_async.learner.checkpoint import load_learner, save_learner
from vapo_async.learner.learner import Learner
from vapo_async.learner.ranks import OneRank, Ranks
from vapo_async.models.char_tokenizer import build_char_tokenizer

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

SMALL_STEPS = dataclasses.replace(FIVE_STEPS, policy_lr=2e-6, critic_lr=2e-6, lr_warmup_steps=0, kl_coef=None)
"""A step is far below the spacing of most of the weights in bfloat16."""
SEVERAL = 120
"""Tokens of a pass, so that a step has several."""


def on_the_host(ranks: Ranks) -> list[Found]:
    settings: list[tuple[int, dict[str, Any]]] = [
        (1, {"offload_optimizer": True}),
        (2, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True}),
        (3, {"offload_optimizer": True, "offload_parameters": True, "activation_checkpointing": True}),
        (3, {"activation_checkpointing": True}),
    ]
    return [learned(make_learner(ranks, stage, **more), [make_batch()]) for stage, more in settings]


def test_offloading_and_computing_again_learn_what_plain_torch_learns() -> None:
    metrics, parameters = learned(make_learner(OneRank(), None), [make_batch()])
    for of_rank in in_ranks(2, on_the_host):
        assert len(of_rank) == 5
        for its_metrics, its_parameters in of_rank:
            assert_same_metrics(its_metrics, metrics)
            assert_close(its_parameters, parameters, atol=1e-5)


def masters_of(learner: Learner) -> dict[str, Tensor]:
    masters = learner.policy_backend.masters()
    assert masters is not None
    return {f"policy/{name}": p.detach().cpu().clone() for name, p in masters}


Trained = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, float]]
"""The policy's masters before and after, its parameters after, and metrics."""


def in_bfloat16(ranks: Ranks) -> dict[tuple[int, bool], Trained]:
    found = {}
    for stage in STAGES:
        for offload in (False, True):
            learner = make_learner(
                ranks, stage, SMALL_STEPS, max_tokens=SEVERAL, dtype=torch.bfloat16, offload_optimizer=offload
            )
            before = masters_of(learner)
            (metrics,), parameters = learned(learner, [make_batch()])
            found[stage, offload] = before, masters_of(learner), parameters, metrics
    return found


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_small_steps_add_up_in_masters_of_bfloat16_parameters(size: int) -> None:
    """They go the way of a float32 run from the same weights; rounded to bfloat16 at every step, most would be lost."""
    exact = make_learner(OneRank(), None, SMALL_STEPS, max_tokens=SEVERAL, rounded=True)
    start = parameters_of(exact)
    (expected,), _ = learned(exact, [make_batch()])
    moves = {name: p - start[name] for name, p in parameters_of(exact).items()}
    for of_rank in in_ranks(size, in_bfloat16):
        assert len(of_rank) == 2 * len(STAGES)
        for setting, (before, after, parameters, metrics) in of_rank.items():
            for name, master in after.items():
                assert torch.equal(before[name], start[name]), (setting, name)
                assert parameters[name].dtype == torch.bfloat16 and master.dtype == torch.float32
                assert torch.equal(parameters[name], master.bfloat16()), (setting, name)
            own = torch.cat([(after[name] - before[name]).flatten() for name in after])
            way = torch.cat([moves[name].flatten() for name in after])
            assert float(torch.cosine_similarity(own, way, dim=0)) > 0.9, setting
            for model in ("policy", "critic"):
                name = f"grad_norm_{model}"
                assert metrics[name] == pytest.approx(expected[name], rel=0.05), setting
            lost = torch.cat([(parameters[name] == start[name]).flatten() for name in after])
            assert float(lost.float().mean()) > 0.5, "the steps are smaller than what bfloat16 can tell apart"


def save_and_go_on(ranks: Ranks, folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for stage in STAGES:
        learner = make_learner(ranks, stage, SMALL_STEPS, dtype=torch.bfloat16, kept=0)
        learned(learner, [make_batch()])
        (folder / f"{stage}").mkdir(exist_ok=True)
        save_learner(learner, build_char_tokenizer(), folder / f"{stage}")
        learned(learner, [make_batch(1)], first=1)
        found.append(masters_of(learner))
    return found


def load_and_go_on(ranks: Ranks, folder: Path) -> list[dict[str, Tensor]]:
    found = []
    for stage in STAGES:
        learner = make_learner(ranks, stage, SMALL_STEPS, dtype=torch.bfloat16, kept=0)
        load_learner(learner, folder / f"{stage}")
        learned(learner, [make_batch(1)], first=1)
        found.append(masters_of(learner))
    return found


def test_a_bfloat16_run_goes_on_from_its_masters_bit_for_bit(tmp_path: Path) -> None:
    straight = in_ranks(2, save_and_go_on, tmp_path)[0]
    resumed = in_ranks(2, load_and_go_on, tmp_path)[0]
    for one, other in zip(resumed, straight, strict=True):
        assert_close(one, other, atol=0)
