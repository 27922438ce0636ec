"""Saves and loads a learner: the policy as an ordinary Hugging Face folder, everything else as safetensors and JSON.

Nothing here unpickles: a checkpoint may come from anyone.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vapo_async.config import ConfigError
from vapo_async.learner.learner import Learner
from vapo_async.learner.tensors import check_tensors

POLICY_FOLDER = "policy"


def save_learner(learner: Learner, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes into an existing folder; the caller makes the whole checkpoint appear at once.

    Raises:
        OSError, SafetensorError: the disk is full.
    """
    learner.policy.save_pretrained(folder / POLICY_FOLDER, max_shard_size="1TB")  # one file, which resume reads
    try:
        tokenizer.save_pretrained(folder / POLICY_FOLDER)
    except Exception as error:  # the tokenizers library has no narrower type for a full disk
        if "(os error" not in str(error):
            raise
        raise OSError(str(error)) from error
    state: dict[str, Any] = {
        "batches": learner.batches,
        "policy_steps": learner.policy_backend.step_count,
        "critic_steps": 0 if learner.critic_backend is None else learner.critic_backend.step_count,
        "pretraining_variances": learner.pretraining_variances,
    }
    _save(learner.policy_backend.optimizer_tensors(), folder / "policy_optimizer.safetensors")
    if learner.critic is not None and learner.critic_backend is not None:
        _save(learner.critic.state_dict(), folder / "critic.safetensors")
        _save(learner.critic_backend.optimizer_tensors(), folder / "critic_optimizer.safetensors")
    _save({"generator": learner.generator.get_state()}, folder / "learner_random.safetensors")
    (folder / "learner.json").write_text(json.dumps(state, indent=1))


def load_learner(learner: Learner, folder: Path) -> None:
    """The reverse, into a learner built with the same config.

    Raises:
        ConfigError: the checkpoint was written by another kind of run or holds a model of other sizes.
    """
    state = json.loads((folder / "learner.json").read_text())
    policy = load_file(folder / POLICY_FOLDER / "model.safetensors")
    tied = getattr(learner.policy, "all_tied_weights_keys", None) or {}
    check_tensors("policy", policy, _shapes(learner.policy), optional=tied)
    if (learner.critic is not None) != (folder / "critic.safetensors").exists():
        raise ConfigError(f"checkpoint {folder} and algorithm.advantage disagree on whether there is a critic")
    if learner.critic is not None:
        critic = load_file(folder / "critic.safetensors")
        check_tensors("critic", critic, _shapes(learner.critic))
        learner.critic.load_state_dict(critic)
    learner.policy.load_state_dict(policy, strict=False)  # tied weights are saved once
    learner.policy_backend.load_optimizer_tensors(
        load_file(folder / "policy_optimizer.safetensors"), state["policy_steps"]
    )
    if learner.critic_backend is not None:
        learner.critic_backend.load_optimizer_tensors(
            load_file(folder / "critic_optimizer.safetensors"), state["critic_steps"]
        )
    learner.generator.set_state(load_file(folder / "learner_random.safetensors")["generator"])
    learner.batches = state["batches"]
    learner.pretraining_variances = state["pretraining_variances"]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
