"""A checkpoint's policy, or its critic, as a Hugging Face folder of its own, for ``scripts/export.py``.

Weights are read and written shard by shard: no more than one shard is held in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING

from vapo_async.checkpoint import POLICY_FOLDER
from vapo_async.config import ConfigError, RunError
from vapo_async.learner.tensor_files import TensorFiles, has_critic
from vapo_async.models.load import DTYPES

SHARD_BYTES = 5_000_000_000
"""Of a file, as Hugging Face writes them."""
_WEIGHTS = "model"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    architecture: str
    parameters: int
    dtype: str
    files: int


def export_policy(checkpoint: Path, folder: Path, dtype: str | None = None) -> Exported:
    """For ``AutoModelForCausalLM`` and vLLM: weights, configuration, generation settings, tokenizer.

    Args:
        checkpoint: a training checkpoint.
        folder: to be made; must not exist.
        dtype: of the weights, ``float32``, ``bfloat16`` or ``float16``; None = as they were trained.

    Raises:
        ConfigError: the folder exists.
        RunError: the checkpoint is broken.
        OSError, SafetensorError: the folder cannot be written.
    """
    policy = checkpoint / POLICY_FOLDER
    config = _config(policy)
    with _open(policy, _WEIGHTS) as tensors:
        return _write(folder, policy, config, tensors, dtype)


def export_critic(checkpoint: Path, folder: Path, dtype: str | None = None) -> Exported:
    """For ``AutoModelForTokenClassification`` with one label: its logit at a token is the value of the state after it.

    Arguments and errors as for :func:`export_policy`; the value that the critic gives to token t, V(s_t), stands at
    token t − 1.

    Raises:
        ConfigError: the run has no critic, or Transformers no such class for the kind of model.
    """
    policy = checkpoint / POLICY_FOLDER
    if not has_critic(checkpoint):
        raise ConfigError(f"no critic in {checkpoint}: its run had algorithm.advantage=group, which needs none")
    config = _config(policy)
    with _reading(policy / "config.json"):
        kind: Any = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(AutoConfig.from_pretrained(policy)), None)
    if kind is None:
        raise ConfigError(f"Transformers has no token classification for models of the kind {config['model_type']}")
    config |= {
        "architectures": [kind.__name__],
        "id2label": {"0": "value"},
        "label2id": {"value": 0},
        "classifier_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    with _open(checkpoint, "critic") as tensors:
        return _write(folder, policy, config, tensors, dtype, _critic_name)


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of what is read, not of the target."""
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RunError(f"the checkpoint is broken: {source}: {reason}; give another one of the run") from error


def _config(policy: Path) -> dict[str, Any]:
    with _reading(policy / "config.json"):
        config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not config.get("architectures"):
            raise ValueError("it names no architecture")
        return config


def _open(folder: Path, stem: str) -> TensorFiles:
    """All of the tensors that the index names, where there is one: a lost file would go unnoticed."""
    with _reading(folder / f"{stem}*.safetensors"):
        tensors = TensorFiles(folder, stem)
        index = folder / f"{stem}.safetensors.index.json"
        expected = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}) if index.exists() else {}
        lost = sorted({file for name, file in expected.items() if name not in tensors})
        if lost:
            raise ValueError(f"{lost[0]} is missing, or lacks tensors that {index.name} names")
        return tensors


def _critic_name(name: str) -> str:
    return name.replace("value_head.", "score.", 1).replace("backbone.", "model.", 1)


def _write(
    folder: Path,
    policy: Path,
    config: dict[str, Any],
    tensors: TensorFiles,
    dtype: str | None,
    renamed: Callable[[str], str] = str,
) -> Exported:
    """The folder appears at once, when it is whole."""
    if folder.exists():
        raise ConfigError(f"{folder} exists: give a folder that is to be made")
    unfinished = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}.partial")
    unfinished.mkdir(parents=True)
    try:
        exported = _fill(unfinished, policy, config, tensors, None if dtype is None else DTYPES[dtype], renamed)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return replace(exported, folder=folder)


def _fill(
    folder: Path,
    policy: Path,
    config: dict[str, Any],
    tensors: TensorFiles,
    to: torch.dtype | None,
    renamed: Callable[[str], str],
) -> Exported:
    checkpoint = policy.parent
    with _reading(checkpoint):
        shards = _shards(tensors, to)
        size = sum(_bytes(tensors, name, to) for name in tensors)
        dtype = str(to or next(iter(tensors.values())).dtype).removeprefix("torch.")
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        whole = len(shards) == 1
        file = f"{_WEIGHTS}.safetensors" if whole else f"{_WEIGHTS}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(map(renamed, names), file)
        with _reading(checkpoint):
            share = {renamed(name): tensors[name].to(to or tensors[name].dtype).contiguous() for name in names}
        save_file(share, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / f"{_WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=1))
    for path in policy.iterdir():
        if not path.name.startswith(f"{_WEIGHTS}") and path.name != "config.json":
            shutil.copy(path, folder / path.name)
    parameters = sum(prod(shape) for shape in tensors.shapes().values())
    return Exported(folder, config["architectures"][0], parameters, dtype, len(shards))


def _shards(tensors: TensorFiles, dtype: torch.dtype | None) -> list[list[str]]:
    """Names for each file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        own = _bytes(tensors, name, dtype)
        if shards[-1] and size + own > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards


def _bytes(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None) -> int:
    tensor = tensors[name]
    return tensor.numel() * (dtype or tensor.dtype).itemsize
