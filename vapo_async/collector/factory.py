"""One engine from its config."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vapo_async.collector.engine import Engine
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.config import ConfigError, EngineConfig, TransformersEngineConfig


def build_engine(
    config: EngineConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    temperature: float,
    seed: int,
) -> Engine:
    """``temperature``: training's or the evaluation's; ``max_length`` is prompt + response in tokens."""
    eos: Any = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ConfigError("the tokenizer has no end token (eos_token_id is None); set one in its tokenizer_config.json")
    match config:
        case TransformersEngineConfig():
            nn.Module.to(model, config.device)
            return TransformersEngine(
                model,
                eos_token_id=eos,
                max_slots=config.max_slots,
                max_length=max_length,
                temperature=temperature,
                kv_cache_on_update=config.kv_cache_on_update,
                seed=seed,
            )
    raise TypeError(f"no engine for {type(config).__name__}")
