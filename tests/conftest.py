"""Shared by all tests: one thread of torch, tiny models, the folder of real data where it is present."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vapo_async.config import Config
from vapo_async.config.load import load_config
from vapo_async.models.char_tokenizer import build_char_tokenizer

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

torch.set_num_threads(1)
# A limit on the time of one example says how busy the machine is.
settings.register_profile("vapo_async", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vapo_async")


def tiny_policy(vocab_size: int, *, tied: bool = True, family: str = "qwen2", seed: int = 0) -> PreTrainedModel:
    """A random model with sharp enough logits that log-probs differ between tokens."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if family == "qwen2" else 1,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    return Qwen2ForCausalLM(Qwen2Config(**sizes, attn_implementation="sdpa")).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_char_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random policy as a Hugging Face folder: enough where learning is not what is tested."""
    folder = tmp_path_factory.mktemp("base")
    policy = tiny_policy(len(tokenizer))
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def guessing_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    from guessing_policy import make_guessing_policy  # it needs this module

    return make_guessing_policy(tmp_path_factory.mktemp("guessing"), tokenizer)


@pytest.fixture
def tiny_config(base_folder: Path, tmp_path: Path) -> Config:
    """A whole run in a second: 2 groups of 4, two mini-batches, one batch of value pretraining."""
    return load_config(tiny_overrides(base_folder, tmp_path))


def tiny_overrides(base_folder: Path, runs_dir: Path) -> list[str]:
    return [
        "model=folder",
        f"model.path={base_folder}",
        f"runs_dir={runs_dir}",
        "launcher=inline",
        "name=tiny",
        "steps=3",
        "algorithm.groups_per_batch=2",
        "algorithm.group_size=4",
        "algorithm.minibatches=2",
        "algorithm.value_pretraining_steps=1",
        "task.max_response_tokens=12",
        "task.heldout_problems=8",
        "engine.max_slots=6",
        "evaluation.problems=4",
        "evaluation.samples=2",
        "evaluation.every=2",
    ]
