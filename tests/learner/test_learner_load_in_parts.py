"""A model loaded in parts is the one that Transformers loads: parameters, buffers, settings, log-probs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from rank_processes import in_ranks
from test_learner_learner import ALGORITHM, VOCAB, make_batch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, Qwen2ForSequenceClassification

from vapo_async.config import ConfigError, DeepSpeedLearnerConfig
from vapo_async.learner.backend import Schedule
from vapo_async.learner.learner import Learner
from vapo_async.learner.models import Critic, policy_log_probs
from vapo_async.learner.ranks import Ranks
from vapo_async.models.load import load_policy

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

CONFIG = DeepSpeedLearnerConfig(zero_stage=3)
TOKENS = torch.randint(0, VOCAB, (3, 200), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
CASES = [(tied, dtype) for tied in (True, False) for dtype in ("float32", "bfloat16")]


def write(folder: Path, *, tied: bool) -> Path:
    """As the models of the hub are: with a padding token, and settings for generation that are not the default's."""
    policy = tiny_policy(VOCAB, tied=tied)
    policy.config.pad_token_id = 0
    policy.generation_config = GenerationConfig(eos_token_id=[1, 2], pad_token_id=0, repetition_penalty=1.05)
    policy.save_pretrained(folder)
    return folder


def write_reward_model(folder: Path) -> Path:
    """Without an output embedding."""
    config = AutoConfig.from_pretrained(write(folder, tied=False))
    torch.manual_seed(1)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def log_probs(policy: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return policy_log_probs(policy, TOKENS, MASK, temperature=1.0, chunk_tokens=64)[0]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def loaded(ranks: Ranks, folder: Path) -> list[tuple[Tensor, dict[str, Tensor], dict[str, object]]]:
    import deepspeed

    from vapo_async.learner.load_in_parts import load_in_parts

    found = []
    for tied, dtype in CASES:
        model = load_in_parts(folder / str(tied), dtype, CONFIG)
        assert all(p.numel() == 0 for p in model.parameters()), "no rank has whole parameters"
        assert model.generation_config is not None
        with deepspeed.zero.GatheredParameters(list(model.parameters())):  # as a backend's engine does, layer by layer
            found.append((log_probs(model), buffers(model), model.generation_config.to_dict()))
    return found


def test_it_is_the_model_that_transformers_loads(tmp_path: Path) -> None:
    for tied in (True, False):
        write(tmp_path / str(tied), tied=tied)
    for of_rank in in_ranks(2, loaded, tmp_path):
        for (tied, dtype), (its_log_probs, its_buffers, generation) in zip(CASES, of_rank, strict=True):
            whole = load_policy(tmp_path / str(tied), dtype)
            expected = buffers(whole)
            assert its_buffers.keys() == expected.keys() and len(expected) > 0
            for name, buffer in expected.items():
                assert its_buffers[name].dtype == buffer.dtype and torch.equal(its_buffers[name], buffer), name
            # Other addresses may be summed in another order.
            assert (its_log_probs - log_probs(whole)).abs().max() < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
            assert whole.generation_config is not None
            assert generation == whole.generation_config.to_dict() and generation["eos_token_id"] == [1, 2]


def trained(ranks: Ranks, policy: Path, reward_model: Path) -> tuple[dict[str, float], list[Tensor]]:
    """In bfloat16, the critic from a reward model; the critic's parameters at its start."""
    from vapo_async.learner.backend_deepspeed import DeepSpeedBackend
    from vapo_async.learner.load_in_parts import load_in_parts

    def backend(module: nn.Module, schedule: Schedule, prefix: str) -> DeepSpeedBackend:
        return DeepSpeedBackend(module, schedule, CONFIG, ranks, prefix)

    critic = Critic.from_decoder_of(load_in_parts(reward_model, "bfloat16", CONFIG, decoder_only=True))
    model = load_in_parts(policy, "bfloat16", CONFIG)
    config = dataclasses.replace(CONFIG, ranks=ranks.size)
    learner = Learner(ALGORITHM, config, model, critic, temperature=1.0, seed=0, ranks=ranks, make_backend=backend)
    assert learner.critic_backend is not None
    start = [p.clone() for name, p in learner.critic_backend.parameters() if name.startswith("backbone.")]
    return learner.update(make_batch(), 0).metrics, start


def test_a_critic_starts_from_a_reward_model_and_learns_in_bfloat16(tmp_path: Path) -> None:
    policy, reward_model = write(tmp_path / "policy", tied=True), write_reward_model(tmp_path / "reward")
    expected = Qwen2ForSequenceClassification.from_pretrained(reward_model, dtype=torch.bfloat16)
    for metrics, start in in_ranks(2, trained, policy, reward_model):
        assert metrics["grad_norm_critic"] > 0 and metrics["grad_norm_policy"] > 0
        for p, q in zip(start, expected.model.parameters(), strict=True):
            assert torch.equal(p, q)


def refused(ranks: Ranks, folders: list[Path]) -> list[str]:
    from vapo_async.learner.load_in_parts import load_in_parts

    errors = []
    for folder in folders:
        with pytest.raises(ConfigError) as error:
            load_in_parts(folder, "float32", CONFIG)
        errors.append(str(error.value))
    return errors


def test_a_parameter_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    reward_model, other = write_reward_model(tmp_path / "reward"), write(tmp_path / "other", tied=True)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    missing, wrong = in_ranks(1, refused, [reward_model, other])[0]
    assert "lm_head.weight is missing, expected [18, 64]" in missing and "\n" not in missing
    assert "gate_proj.weight is [96, 64], expected [80, 64]" in wrong
