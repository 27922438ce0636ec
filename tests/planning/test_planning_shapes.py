"""Sizes of models against Transformers' own, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_policy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from vapo_async.config import ConfigError, EmbeddedModelConfig, FolderModelConfig, SmolLM2ModelConfig
from vapo_async.learner.models import Critic
from vapo_async.models.char_tokenizer import SYMBOLS
from vapo_async.planning.shapes import KNOWN, SMOLLM2, ModelShape, read_shape, shape_of


def empty(shape: ModelShape, family: str) -> PreTrainedModel:
    """A model of that shape without memory."""
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "tie_word_embeddings": shape.tied,
    }
    with torch.device("meta"):
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        return Qwen2ForCausalLM(Qwen2Config(**sizes))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (KNOWN["Qwen/Qwen2.5-0.5B"], 494_032_768),
        (KNOWN["Qwen/Qwen2.5-1.5B"], 1_543_714_304),
        (KNOWN["Qwen/Qwen2.5-7B"], 7_615_616_512),
        (KNOWN["Qwen/Qwen2.5-32B"], 32_763_876_352),
        (SMOLLM2, 134_515_008),
    ],
    ids=lambda value: value.name if isinstance(value, ModelShape) else "",
)
def test_known_models_have_as_many_parameters_as_published(shape: ModelShape, parameters: int) -> None:
    assert shape.parameters == parameters


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers_modules(family: str, tied: bool) -> None:
    shape = ModelShape("x", 48, 3, 6, 2, 16, 80, 101, tied=tied, attention_bias=family == "qwen2")
    policy = empty(shape, family)
    assert shape.parameters == count(policy)
    assert shape.layer_parameters == count(policy.get_decoder().layers[0])
    assert shape.critic_parameters == count(Critic.from_policy(policy))
    assert shape.embedding_parameters == policy.get_output_embeddings().weight.numel()


def test_keys_and_values_of_a_token() -> None:
    shape = KNOWN["Qwen/Qwen2.5-32B"]
    assert shape.kv_bytes_per_token(2) == 2 * 64 * 8 * 128 * 2 == 262_144
    assert shape.kv_bytes_per_token(2, 4) == 65_536
    assert shape.kv_bytes_per_token(2, 16) == shape.kv_bytes_per_token(2, 8)  # a head is not cut


def test_every_model_choice_has_a_shape(tmp_path: Path) -> None:
    assert shape_of(SmolLM2ModelConfig()) == SMOLLM2
    embedded = shape_of(EmbeddedModelConfig())
    assert embedded.vocabulary == len(SYMBOLS)
    assert (embedded.hidden, embedded.layers, embedded.head_dim, embedded.tied) == (64, 3, 32, True)
    assert shape_of(FolderModelConfig(path="Qwen/Qwen2.5-32B")).hidden == 5120
    for family in ("qwen2", "llama"):
        policy = tiny_policy(33, tied=family == "qwen2", family=family)
        policy.save_pretrained(tmp_path / family)
        found = shape_of(FolderModelConfig(path=str(tmp_path / family)))
        assert (found.name, found.parameters) == (family, count(policy))
        assert found.kv_heads == policy.config.num_key_value_heads


def test_what_cannot_be_planned_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=no/where is no folder, .* or one of Qwen/Qwen2\.5-0\.5B"):
        shape_of(FolderModelConfig(path="no/where"))
    with pytest.raises(ConfigError, match=r"cannot read the model's sizes from .*config\.json: No such file"):
        read_shape(tmp_path)
    config = tmp_path / "config.json"
    for text, told in (
        ("{", "is not valid JSON"),
        ("[]", "holds no object"),
        ('{"num_local_experts": 8}', "mixture of experts"),
        ('{"hidden_size": 8}', "num_attention_heads is None, expected a whole number ≥ 1"),
        ('{"hidden_size": "8"}', "hidden_size is '8', expected a whole number ≥ 1"),
        ('{"hidden_size": true}', "hidden_size is True, expected a whole number ≥ 1"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigError, match=told) as error:
            read_shape(tmp_path)
        assert "\n" not in str(error.value)


def test_heads_of_their_own_width_are_read(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(
        json.dumps({**sizes, "vocab_size": 10, "head_dim": 32, "model_type": "qwen3"})
    )
    shape = read_shape(tmp_path)
    assert (shape.query_width, shape.kv_width, shape.attention_bias, shape.tied) == (128, 128, False, False)
