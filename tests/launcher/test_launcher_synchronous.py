"""``launcher=inline buffer.max_staleness=0`` is synchronous training, bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides
from running import FEW_PROBLEMS
from safetensors.torch import load_file

from vapo_async.build import (
    BaseModel,
    build_learner,
    derived_seed,
    engine_seed,
    max_length,
)
from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import Config, FolderModelConfig, InlineLauncherConfig, KVCacheOnUpdate, TransformersEngineConfig
from vapo_async.config.load import load_config
from vapo_async.launcher.run import launch
from vapo_async.metrics.console import Console
from vapo_async.models.load import load_policy, load_tokenizer
from vapo_async.prompts.stream import PromptStream
from vapo_async.prompts.tasks import build_task
from vapo_async.schema import Ticket, make_trajectory, set_score
from vapo_async.verifier.scoring import ScoreRequest, TaskVerifier


@pytest.fixture
def tiny_config(base_folder: Path, tmp_path: Path) -> Config:
    return load_config([*tiny_overrides(base_folder, tmp_path), FEW_PROBLEMS])


def synchronous_weights(config: Config) -> dict[str, torch.Tensor]:
    """Sample a batch, score it, learn from it, copy the weights; again. No buffer, no tickets, no collector."""
    assert isinstance(config.model, FolderModelConfig)
    assert isinstance(config.engine, TransformersEngineConfig)
    folder = Path(config.model.path)
    tokenizer = load_tokenizer(folder)
    policy = load_policy(folder, config.model.dtype)
    engine = TransformersEngine(
        policy,
        eos_token_id=tokenizer.eos_token_id,
        max_slots=config.engine.max_slots,
        max_length=max_length(config),
        temperature=config.engine.temperature,
        kv_cache_on_update=KVCacheOnUpdate.recompute,
        seed=engine_seed(config, 0),
    )
    learner = build_learner(config, BaseModel(folder, folder))
    prompts = PromptStream(
        build_task(config.task, config.seed), tokenizer, config.task, derived_seed(config.seed, "prompts")
    )
    algorithm = config.algorithm
    with TaskVerifier(config.task, config.verifier) as verifier:
        for version in range(algorithm.value_pretraining_steps + config.steps):
            batch = [prompts.next() for _ in range(algorithm.groups_per_batch)]
            for i, prompt in enumerate(batch):
                engine.submit(
                    GenerationRequest(i, prompt.token_ids, algorithm.group_size, config.task.max_response_tokens)
                )
            sampled = {}
            while engine.num_unfinished:
                for completion in engine.step():
                    sampled[completion.request_id, completion.response.sample_index] = completion.response
            trajectories = []
            for (i, _), response in sorted(sampled.items()):
                trajectory = make_trajectory(batch[i], Ticket(version * len(batch) + i, version), response)
                text = tokenizer.decode(response.token_ids, skip_special_tokens=True)
                request = ScoreRequest(batch[i].problem, text, len(response.token_ids))
                set_score(trajectory, verifier.score([request])[0])
                trajectories.append(trajectory)
            learner.update(trajectories, version)
            with torch.no_grad():
                for target, source in zip(policy.parameters(), learner.policy.parameters(), strict=True):
                    target.copy_(source)
    return {name: p.detach().clone() for name, p in learner.policy.named_parameters()}


def trained_weights(config: Config) -> dict[str, torch.Tensor]:
    _, run_dir = launch(config, Console())
    return load_file(sorted((run_dir / "checkpoints").glob("step_*"))[-1] / "policy" / "model.safetensors")


def with_staleness(config: Config, max_staleness: int, seed: int = 0) -> Config:
    buffer = dataclasses.replace(config.buffer, max_staleness=max_staleness)
    return dataclasses.replace(config, buffer=buffer, seed=seed)


@pytest.mark.parametrize("overlap_steps", [0, 5])
def test_no_staleness_equals_a_synchronous_loop_bit_for_bit(tiny_config: Config, overlap_steps: int) -> None:
    """Whatever could be generated while a batch is learned: nothing may be."""
    config = with_staleness(tiny_config, 0)
    config = dataclasses.replace(config, launcher=InlineLauncherConfig(overlap_steps=overlap_steps))
    expected, found = synchronous_weights(config), trained_weights(config)
    assert expected.keys() == found.keys()
    base = load_file(Path(config.model.path) / "model.safetensors")  # type: ignore[attr-defined]
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert not torch.equal(base[name], tensor), f"{name} was never trained"


@pytest.mark.parametrize("max_staleness", [0, 3])
def test_same_seed_same_weights(tiny_config: Config, max_staleness: int) -> None:
    config = with_staleness(tiny_config, max_staleness)
    first, second = trained_weights(config), trained_weights(config)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = trained_weights(with_staleness(tiny_config, max_staleness, seed=1))
    assert any(not torch.equal(first[name], other[name]) for name in first)
