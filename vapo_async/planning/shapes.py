"""The sizes of a model: what memory and arithmetic depend on. Nothing is loaded, and no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vapo_async.config import ConfigError, EmbeddedModelConfig, FolderModelConfig, ModelConfig, SmolLM2ModelConfig

_EMBEDDED_VOCABULARY = 19
"""Characters of the embedded model's tokenizer, which is not imported for it."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Qwen2 or Llama kind: rotary attention with grouped keys, a gated MLP, RMS norms."""

    name: str
    hidden: int
    """H, width of a token's hidden state."""
    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values, which divide ``heads``."""
    head_dim: int
    intermediate: int
    """I, width of the MLP."""
    vocabulary: int
    tied: bool
    """The output embedding is the input embedding."""
    attention_bias: bool = False
    """Queries, keys and values have biases (Qwen2)."""

    @property
    def query_width(self) -> int:
        """Q, of all heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K, of the keys of all heads together; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Of one embedding: the largest parameter of all but the smallest vocabularies."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Of one layer, its two norms included."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        biases = self.query_width + 2 * self.kv_width if self.attention_bias else 0
        return attention + biases + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def backbone_parameters(self) -> int:
        """Without the output embedding where that is one of its own."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """Of the policy; tied ones once."""
        return self.backbone_parameters + (0 if self.tied else self.embedding_parameters)

    @property
    def critic_parameters(self) -> int:
        """A backbone of its own and a scalar head."""
        return self.backbone_parameters + self.hidden + 1

    def kv_bytes_per_token(self, dtype_bytes: int, tensor_parallel: int = 1) -> int:
        """Keys and values of one token on one rank; where there are fewer heads than ranks they are repeated."""
        heads = -(-self.kv_heads // tensor_parallel)
        return 2 * self.layers * heads * self.head_dim * dtype_bytes


KNOWN = {
    shape.name: shape
    for shape in (
        ModelShape("Qwen/Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151_936, tied=True, attention_bias=True),
        ModelShape("Qwen/Qwen2.5-1.5B", 1536, 28, 12, 2, 128, 8960, 151_936, tied=True, attention_bias=True),
        ModelShape("Qwen/Qwen2.5-7B", 3584, 28, 28, 4, 128, 18_944, 152_064, tied=False, attention_bias=True),
        ModelShape("Qwen/Qwen2.5-32B", 5120, 64, 40, 8, 128, 27_648, 152_064, tied=False, attention_bias=True),
    )
}
"""Hub names whose shapes are known without a hub."""
SMOLLM2 = ModelShape("SmolLM2-135M", 576, 30, 9, 3, 64, 1536, 49_152, tied=True)


def shape_of(model: ModelConfig) -> ModelShape:
    """The policy's shape.

    Raises:
        ConfigError: a hub name that is not known here, or a folder whose ``config.json`` says too little.
    """
    match model:
        case SmolLM2ModelConfig():
            return SMOLLM2
        case EmbeddedModelConfig():
            head = model.hidden_size // model.num_heads
            sizes = model.hidden_size, model.num_layers, model.num_heads, model.num_heads, head
            vocabulary = _EMBEDDED_VOCABULARY
            return ModelShape("embedded", *sizes, model.intermediate_size, vocabulary, tied=True, attention_bias=True)
        case FolderModelConfig():
            folder = Path(model.path).expanduser()
            if folder.is_dir():
                return read_shape(folder)
            if model.path in KNOWN:
                return KNOWN[model.path]
            raise ConfigError(
                f"model.path={model.path} is no folder, and its sizes are not known here; give the folder of the "
                f"model (its config.json is enough), or one of {', '.join(KNOWN)}"
            )
    raise ConfigError(
        f"model has type {type(model).__name__}; expected embedded, folder or smollm2: choose with model="
    )


def read_shape(folder: Path) -> ModelShape:
    """From a Hugging Face folder's ``config.json``.

    Raises:
        ConfigError: it cannot be read, or is not of the kind that :class:`ModelShape` describes.
    """
    path = folder / "config.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the model's sizes from {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no object; expected the config.json of a model")
    if any("experts" in key for key in loaded):
        raise ConfigError(f"{path} describes a mixture of experts; expected a dense model of the Qwen2 or Llama kind")
    return _from_config(loaded, folder.name, path)


def _from_config(config: Mapping[str, Any], name: str, path: Path) -> ModelShape:
    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{path}: {key} is {value!r}, expected a whole number ≥ 1")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return ModelShape(
        name,
        hidden,
        size("num_hidden_layers"),
        heads,
        size("num_key_value_heads", heads),
        size("head_dim", hidden // heads),
        size("intermediate_size"),
        size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
    )
