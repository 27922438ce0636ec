"""Saves and loads a learner: the policy as an ordinary Hugging Face folder, everything else as safetensors and JSON.

Every rank writes its share of the tensors and reads what it needs of all, so a run can go on with another number of
ranks, and with another backend. Nothing here unpickles: a checkpoint may come from anyone.
"""

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vapo_async.checkpoint import POLICY_FOLDER
from vapo_async.config import ConfigError
from vapo_async.learner.backend import Backend
from vapo_async.learner.learner import Learner
from vapo_async.learner.tensor_files import TensorFiles, has_critic, save_share
from vapo_async.learner.tensors import check_tensors

_WEIGHTS = "model"


def save_learner(learner: Learner, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes into an existing folder that all ranks see; all call it, and the checkpoint is whole once all are done.

    Raises:
        OSError, SafetensorError: the disk is full.
    """
    policy, ranks = folder / POLICY_FOLDER, learner.ranks
    policy.mkdir(exist_ok=True)
    if ranks.rank == 0:
        _save_description(learner.policy, tokenizer, policy)
        state: dict[str, Any] = {
            "batches": learner.batches,
            "policy_steps": learner.policy_backend.step_count,
            "critic_steps": 0 if learner.critic_backend is None else learner.critic_backend.step_count,
            "pretraining_variances": learner.pretraining_variances,
        }
        save_file({"generator": learner.generator.get_state()}, folder / "learner_random.safetensors")
        (folder / "learner.json").write_text(json.dumps(state, indent=1))
    for what, backend, place, stem in _models(learner, folder):
        save_share(place, stem, backend.parameters(), ranks)
        if (masters := backend.masters()) is not None:
            save_share(folder, f"{what}_masters", masters, ranks)
        save_share(folder, f"{what}_optimizer", backend.optimizer_tensors(), ranks)


def load_learner(learner: Learner, folder: Path) -> None:
    """The reverse, into a learner built with the same config; all ranks call it.

    Raises:
        ConfigError: the checkpoint was written by another kind of run or holds a model of other sizes.
    """
    state = json.loads((folder / "learner.json").read_text())
    if (learner.critic_backend is not None) != has_critic(folder):
        raise ConfigError(f"checkpoint {folder} and algorithm.advantage disagree on whether there is a critic")
    with ExitStack() as files:
        found = []
        for what, backend, place, stem in _models(learner, folder):
            if any(folder.glob(f"{what}_masters*.safetensors")):  # finer than the model's own
                place, stem = folder, f"{what}_masters"
            found.append((what, backend, files.enter_context(TensorFiles(place, stem))))
        for what, backend, tensors in found:  # all, before anything is loaded
            check_tensors(what, tensors, backend.shapes)
        for what, backend, tensors in found:
            backend.load_parameters(tensors.__getitem__)
            moments = files.enter_context(TensorFiles(folder, f"{what}_optimizer"))
            backend.load_optimizer_tensors(moments, state[f"{what}_steps"])
    learner.generator.set_state(load_file(folder / "learner_random.safetensors")["generator"])
    learner.batches = state["batches"]
    learner.pretraining_variances = state["pretraining_variances"]


def _models(learner: Learner, folder: Path) -> list[tuple[str, Backend, Path, str]]:
    """Each with the place and the stem of the files of its weights."""
    models: list[tuple[str, Backend, Path, str]] = [
        ("policy", learner.policy_backend, folder / POLICY_FOLDER, _WEIGHTS)
    ]
    if learner.critic_backend is not None:
        models.append(("critic", learner.critic_backend, folder, "critic"))
    return models


def _save_description(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """All of a Hugging Face folder but the weights."""
    config = copy.copy(policy.config)
    config.architectures = [type(policy).__name__]
    config.dtype = policy.dtype
    config.save_pretrained(folder)
    if policy.generation_config is not None:
        policy.generation_config.save_pretrained(folder)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no narrower type for a full disk
        if "(os error" not in str(error):
            raise
        raise OSError(str(error)) from error
