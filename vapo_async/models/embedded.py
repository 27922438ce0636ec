"""The embedded base model: pretrained here once, then an ordinary Hugging Face folder in the user's cache."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import reasoning_gym
import torch
from transformers import GenerationConfig

from vapo_async.config import ChainSumTaskConfig, EmbeddedModelConfig
from vapo_async.models.cache import cache_root, ensure_folder, recipe_hash
from vapo_async.models.char_tokenizer import EOS, PAD, SYMBOLS, build_char_tokenizer
from vapo_async.models.pretrain import pretrain
from vapo_async.models.quality import measure

RECIPE_VERSION = 1
"""Raise it when the code that makes the model changes what it makes."""
RECIPE_FILE = "recipe.json"


def ensure_embedded(config: EmbeddedModelConfig, progress: Callable[[str], None]) -> Path:
    """The folder of the base that ``config`` describes; pretrains it (a minute or two on one core) the first time.

    ``recipe.json`` in it holds the recipe, the seconds it took and the :class:`~vapo_async.models.quality.Quality`
    that was measured at the end. Torch's thread count is left as the caller set it.
    """
    recipe = embedded_recipe(config)
    folder = cache_root(config.cache_dir) / f"embedded-{recipe_hash(recipe)}"

    def build(unfinished: Path) -> None:
        started = time.monotonic()
        model = pretrain(config, progress, default_heldout_questions())
        seconds = time.monotonic() - started
        quality = measure(model)
        model.generation_config = GenerationConfig(eos_token_id=SYMBOLS.index(EOS), pad_token_id=SYMBOLS.index(PAD))
        model.save_pretrained(unfinished)
        build_char_tokenizer().save_pretrained(unfinished)
        made = {"recipe": recipe, "pretraining_s": round(seconds, 1), "quality": quality.as_dict()}
        (unfinished / RECIPE_FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        progress(
            f"embedded model ready after {seconds:.0f} s: {quality.accuracy:.0%} right at T = 1, "
            f"{quality.greedy_accuracy:.0%} greedily; kept in {folder}"
        )

    return ensure_folder(
        folder, build, waiting=lambda: progress("another process is pretraining the embedded model: waiting for it")
    )


def embedded_recipe(config: EmbeddedModelConfig) -> dict[str, object]:
    """All that decides what the model becomes."""
    recipe: dict[str, object] = asdict(config)
    for unrelated in ("cache_dir", "dtype", "critic_path"):
        del recipe[unrelated]
    return recipe | {"recipe_version": RECIPE_VERSION, "torch": torch.__version__}


def default_heldout_questions() -> frozenset[str]:
    """Questions that ``task=chain_sum`` holds out by default, and some more: never pretrained on."""
    task = ChainSumTaskConfig()
    rows = reasoning_gym.create_dataset(
        "chain_sum",
        size=2 * task.heldout_problems,
        seed=task.heldout_seed,
        min_terms=task.min_terms,
        max_terms=task.max_terms,
        min_digits=task.min_digits,
        max_digits=task.max_digits,
    )
    return frozenset(f"{row['metadata']['expression'].replace(' ', '')}:" for row in rows)
