"""A short supervised training on worked solutions, for a base that is too weak to be rewarded; then a cached folder."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from vapo_async.config import WarmStartModelConfig
from vapo_async.models.cache import cache_root, ensure_folder, recipe_hash
from vapo_async.models.load import load_policy, load_tokenizer

RECIPE_VERSION = 1
"""Raise it when the code below changes what it makes."""
RECIPE_FILE = "recipe.json"
Example = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its worked solution, the end token included."""
IGNORED = -100
"""Label of prompt and padding."""
_PASS_EXAMPLES = 24
"""Examples of one forward and backward pass."""
_WARMUP_SHARE = 0.1
_REPORT_EVERY_S = 5.0


def ensure_warm_start(
    base: Path,
    tokenizer: Path,
    config: WarmStartModelConfig,
    examples: Sequence[Example],
    progress: Callable[[str], None],
) -> Path:
    """The folder of ``base`` after one pass over ``examples``; trains (minutes) the first time.

    ``recipe.json`` in it holds the recipe, the seconds it took and the loss at both ends. Torch's thread count is left
    as the caller set it.

    Args:
        base: the model's folder; its weights and the examples' tokens are part of the recipe.
        tokenizer: the tokenizer's folder, saved with the model.
        examples: ``config.warm_start_steps · config.warm_start_batch_size`` of them.
    """
    recipe = warm_start_recipe(base, config, examples)
    folder = cache_root(config.cache_dir) / f"warm-start-{recipe_hash(recipe)}"

    def build(unfinished: Path) -> None:
        started = time.monotonic()
        model = load_policy(base, "float32")
        losses = warm_start(model, config, examples, progress)
        seconds = time.monotonic() - started
        model.save_pretrained(unfinished)
        load_tokenizer(tokenizer).save_pretrained(unfinished)
        tenth = max(1, len(losses) // 10)
        first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
        made = {"recipe": recipe, "seconds": round(seconds, 1), "first_loss": first, "last_loss": last}
        (unfinished / RECIPE_FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        progress(f"warm start ready after {seconds:.0f} s: loss {first:.3f} → {last:.3f}; kept in {folder}")

    return ensure_folder(
        folder, build, waiting=lambda: progress("another process makes the warm start: waiting for it")
    )


def warm_start_recipe(base: Path, config: WarmStartModelConfig, examples: Sequence[Example]) -> dict[str, object]:
    """All that decides what the model becomes."""
    return {
        "base_sha256": _digest(base),
        "examples_sha256": hashlib.sha256(json.dumps(examples).encode()).hexdigest(),
        "steps": config.warm_start_steps,
        "batch_size": config.warm_start_batch_size,
        "lr": config.warm_start_lr,
        "seed": config.warm_start_seed,
        "recipe_version": RECIPE_VERSION,
        "torch": torch.__version__,
    }


def _digest(base: Path) -> str:
    """Of the model's configuration and weights (about a second per GB)."""
    total = hashlib.sha256()
    for path in sorted(p for pattern in ("config.json", "*.safetensors", "*.bin") for p in base.glob(pattern)):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def warm_start(
    model: PreTrainedModel,
    config: WarmStartModelConfig,
    examples: Sequence[Example],
    progress: Callable[[str], None],
) -> list[float]:
    """Trains ``model`` in place on each example once, AdamW on the responses' mean cross-entropy; the steps' losses.

    The caller's random state is left alone.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.warm_start_lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    started = last = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.warm_start_seed)
        model.train()
        batches = _batches(examples, config.warm_start_batch_size)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = config.warm_start_lr * _schedule(step, len(batches))
            tokens = sum(int((part.labels != IGNORED).sum()) for part in batch)
            loss = 0.0
            for part in batch:
                share = response_loss(model, part) / tokens
                share.backward()
                loss += float(share.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            now = time.monotonic()
            if now - last >= _REPORT_EVERY_S or len(losses) == len(batches):
                last, left = now, (now - started) / len(losses) * (len(batches) - len(losses))
                progress(f"warm start: step {len(losses)}/{len(batches)}, loss {losses[-1]:.3f}, {left:.0f} s left")
    model.eval()
    return losses


def _schedule(step: int, steps: int) -> float:
    """Linear up over the first tenth of the steps, then linearly towards 0."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))


@dataclass(frozen=True)
class ExampleBatch:
    """N right-padded sequences; ``labels`` is −100 on the prompt and the padding."""

    input_ids: Tensor  # [N, L] int64
    labels: Tensor  # [N, L] int64


def encode_examples(examples: Sequence[Example]) -> ExampleBatch:
    """Token ids and labels of some examples."""
    length = max(len(prompt) + len(response) for prompt, response in examples)
    rows = [(*prompt, *response, *(0,) * (length - len(prompt) - len(response))) for prompt, response in examples]
    input_ids = torch.tensor(rows, dtype=torch.int64)
    start = torch.tensor([len(prompt) for prompt, _ in examples])[:, None]
    end = torch.tensor([len(prompt) + len(response) for prompt, response in examples])[:, None]
    position = torch.arange(length)
    return ExampleBatch(input_ids, torch.where((position >= start) & (position < end), input_ids, IGNORED))


def response_loss(model: PreTrainedModel, batch: ExampleBatch) -> Tensor:
    """Sum of the response tokens' cross-entropies; logits are taken at these only.

    No padding mask is needed: padding is on the right, and causal attention never looks right.
    """
    hidden = model.get_decoder()(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
    labels = batch.labels[:, 1:]
    kept = labels != IGNORED
    return functional.cross_entropy(model.get_output_embeddings()(hidden[kept]).float(), labels[kept], reduction="sum")


def _batches(examples: Sequence[Example], size: int) -> list[list[ExampleBatch]]:
    """Every example once, in random order: batches of ``size``, each cut into passes of like lengths (less padding).

    Whole batches of like lengths would need less still, but chains of one length have the same signs and digits.
    """
    shuffled = [examples[i] for i in torch.randperm(len(examples)).tolist()]
    batches = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    return [[encode_examples(part) for part in _passes(batch)] for batch in batches]


def _passes(batch: Sequence[Example]) -> list[Sequence[Example]]:
    by_length = sorted(batch, key=lambda example: len(example[0]) + len(example[1]))
    return [by_length[start : start + _PASS_EXAMPLES] for start in range(0, len(by_length), _PASS_EXAMPLES)]
