import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vapo_async.build import ensure_base
from vapo_async.config import AnswerStyle, Config, ConfigError, FolderModelConfig
from vapo_async.config.load import load_config
from vapo_async.models import warm_start as module
from vapo_async.models.load import load_policy, load_tokenizer
from vapo_async.models.warm_start import (
    Example,
    encode_examples,
    ensure_warm_start,
    response_loss,
    warm_start,
    warm_start_recipe,
)
from vapo_async.prompts.tasks import build_task, normalise_question
from vapo_async.prompts.worked import worked_chain, worked_examples
from vapo_async.schema import Problem
from vapo_async.verifier.extract import extract_answer

EXAMPLES: list[Example] = [((4, 13, 5, 16), (9, 1)), ((4, 16), (4, 1)), ((3, 13, 3, 13, 3, 16), (9, 9, 1))] * 8


def quiet(_: str) -> None:
    """Swallows progress."""


def settings(base_folder: Path, tmp_path: Path, **changes: float) -> FolderModelConfig:
    small = FolderModelConfig(path=str(base_folder), cache_dir=str(tmp_path))
    return replace(small, **{"warm_start_steps": 4, "warm_start_batch_size": 6, "warm_start_lr": 1e-2, **changes})


@pytest.fixture
def policy(base_folder: Path) -> PreTrainedModel:
    return load_policy(base_folder, "float32")


def test_labels_are_the_response_alone() -> None:
    batch = encode_examples(EXAMPLES[:3])
    off = -100
    assert batch.input_ids.tolist() == [
        [4, 13, 5, 16, 9, 1, 0, 0, 0],
        [4, 16, 4, 1, 0, 0, 0, 0, 0],
        [3, 13, 3, 13, 3, 16, 9, 9, 1],
    ]
    assert batch.labels.tolist() == [
        [off, off, off, off, 9, 1, off, off, off],
        [off, off, 4, 1, off, off, off, off, off],
        [off, off, off, off, off, off, 9, 9, 1],
    ]


def test_the_loss_is_the_models_own_log_prob_of_the_response(policy: PreTrainedModel) -> None:
    """One sequence at a time, from the model's own logits, without padding."""
    total = 0.0
    for prompt, response in EXAMPLES[:3]:
        with torch.no_grad():
            log_probs = policy(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        for place, token in enumerate(response, start=len(prompt)):
            total -= float(log_probs[place - 1, token])
    loss = response_loss(policy, encode_examples(EXAMPLES[:3]))
    assert float(loss.detach()) == pytest.approx(total, abs=1e-4)


def test_the_update_is_that_of_a_plain_step(
    policy: PreTrainedModel, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW's first step on the clipped gradient of the mean over the batch's tokens, in however many passes."""
    config = settings(base_folder, tmp_path, warm_start_steps=1, warm_start_batch_size=6)
    plain = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    batch = encode_examples(EXAMPLES[:6])
    logits = plain(input_ids=batch.input_ids).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    monkeypatch.setattr(module, "_PASS_EXAMPLES", 2)
    assert warm_start(policy, config, EXAMPLES[:6], quiet) == [pytest.approx(float(loss.detach()), abs=1e-5)]
    for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        moved = (ours - theirs).abs()  # Adam's first step is ± the learning rate: rounding can turn a tiny gradient
        assert float((moved < 1e-4).float().mean()) > 0.99
    assert not policy.training


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [module._schedule(step, 20) for step in range(20)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 18 / 19])
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] == pytest.approx(1 / 19)
    assert module._schedule(0, 1) == 1.0


def test_every_example_is_seen_once_in_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PASS_EXAMPLES", 4)
    torch.manual_seed(0)
    batches = module._batches(EXAMPLES, 12)
    assert [[len(part.input_ids) for part in batch] for batch in batches] == [[4, 4, 4], [4, 4, 4]]
    seen = [[tuple(t for t in row if t) for part in batch for row in part.input_ids.tolist()] for batch in batches]
    assert sorted(seen[0] + seen[1]) == sorted(prompt + response for prompt, response in EXAMPLES)
    assert all(len(set(map(len, batch))) == 3 for batch in seen), "every length is in each batch"
    for batch in batches:
        widths = [part.input_ids.shape[1] for part in batch]
        assert widths == sorted(widths) and widths[0] < widths[-1], "like lengths share a pass"


def test_it_learns_and_is_the_seeds(base_folder: Path, tmp_path: Path) -> None:
    config = settings(base_folder, tmp_path)
    models = [load_policy(base_folder, "float32") for _ in range(3)]
    before = torch.get_rng_state()
    losses = [
        warm_start(model, replace(config, warm_start_seed=seed), EXAMPLES, quiet)
        for model, seed in zip(models, (0, 0, 1), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    with torch.no_grad():
        start = float(response_loss(load_policy(base_folder, "float32"), encode_examples(EXAMPLES)))  # sums
        end = float(response_loss(models[0], encode_examples(EXAMPLES)))
    assert end < 0.7 * start


def test_it_is_made_once(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(base_folder, tmp_path)
    lines: list[str] = []
    made = ensure_warm_start(base_folder, base_folder, config, EXAMPLES, lines.append)
    assert lines[-2].startswith("warm start: step 4/4, loss ") and lines[-2].endswith(", 0 s left")
    assert lines[-1].startswith("warm start ready after ") and str(made) in lines[-1]
    told = json.loads((made / "recipe.json").read_text())
    assert told["recipe"] == warm_start_recipe(base_folder, config, EXAMPLES)
    assert told["last_loss"] < told["first_loss"]
    assert load_tokenizer(made).eos_token == "$"
    weights = load_policy(base_folder, "float32").get_input_embeddings().weight
    assert not torch.equal(load_policy(made, "float32").get_input_embeddings().weight, weights)

    monkeypatch.setattr(module, "warm_start", lambda *_: pytest.fail("trained again"))
    lines.clear()
    elsewhere = replace(config, path="elsewhere", critic_path="x")  # nothing of it makes other weights
    assert ensure_warm_start(base_folder, base_folder, elsewhere, EXAMPLES, lines.append) == made
    assert lines == []


@pytest.mark.parametrize(
    "change", [{"warm_start_steps": 5}, {"warm_start_batch_size": 7}, {"warm_start_lr": 1e-3}, {"warm_start_seed": 1}]
)
def test_another_recipe_is_another_folder(change: dict[str, float], base_folder: Path, tmp_path: Path) -> None:
    config = settings(base_folder, tmp_path)
    changed = replace(config, **change)
    assert warm_start_recipe(base_folder, changed, EXAMPLES) != warm_start_recipe(base_folder, config, EXAMPLES)


def test_other_examples_and_another_base_are_another_recipe(base_folder: Path, tmp_path: Path) -> None:
    config = settings(base_folder, tmp_path)
    recipe = warm_start_recipe(base_folder, config, EXAMPLES)
    assert warm_start_recipe(base_folder, config, EXAMPLES[1:]) != recipe
    other = load_policy(base_folder, "float32")
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    assert warm_start_recipe(tmp_path / "other", config, EXAMPLES) != recipe


def warm_config(base_folder: Path, tmp_path: Path, *more: str) -> Config:
    return load_config(
        [
            "model=folder",
            f"model.path={base_folder}",
            f"model.cache_dir={tmp_path}",
            "model.warm_start_steps=2",
            "model.warm_start_batch_size=8",
            "launcher=inline",
            "task.max_terms=4",
            *more,
        ]
    )


def test_the_examples_are_training_problems_under_the_tasks_own_prompt(
    base_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = warm_config(
        base_folder,
        tmp_path,
        "task.max_terms=2",
        "task.heldout_problems=100",
        "evaluation.problems=10",
        "task.train_problems=400",
    )
    task = build_task(config.task, 0)
    examples = worked_examples(config.task, tokenizer, len(task.train), 0)
    assert task.overlap_removed > 100, "chains of two terms are few: the splits would overlap"
    heldout = {normalise_question(problem.question) for problem in task.heldout}
    for problem, (prompt, response) in zip(task.train, examples, strict=True):
        assert tokenizer.decode(prompt) == problem.question
        assert normalise_question(problem.question) not in heldout
        text = tokenizer.decode(response)
        assert text == f"{problem.question[:-1]}={problem.answer}#{problem.answer}$"


def test_a_base_is_warm_started_where_the_config_says_so(base_folder: Path, tmp_path: Path) -> None:
    config = warm_config(base_folder, tmp_path)
    base = ensure_base(config, quiet)
    assert base.model.parent == tmp_path and base.model.name.startswith("warm-start-")
    assert base.tokenizer == base.model
    assert isinstance(config.model, FolderModelConfig)
    plain = ensure_base(replace(config, model=replace(config.model, warm_start_steps=0)), quiet)
    assert plain.model == base_folder
    own = ensure_base(replace(config, model=replace(config.model, tokenizer_path=str(base_folder))), quiet)
    assert (own.model, own.tokenizer) == (base.model, base_folder)


def test_what_cannot_be_a_warm_start_is_told(base_folder: Path, tmp_path: Path) -> None:
    def message(*more: str) -> str:
        with pytest.raises(ConfigError) as error:
            ensure_base(warm_config(base_folder, tmp_path, *more), quiet)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "the warm start takes 16 training problems and the task has " in message("task.train_problems=9")
    assert "task.max_response_tokens must be ≥ " in message("task.max_response_tokens=6")
    assert "task.max_prompt_tokens must be ≥ " in message("task.max_prompt_tokens=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=gsm8k", "model.warm_start_steps must be 0 without task=chain_sum, found 2: only that task has worked"),
        ("model.warm_start_steps=-1", "model.warm_start_steps must be ≥ 0, found -1: 0 takes the base as it is"),
        ("model.warm_start_batch_size=0", "model.warm_start_batch_size must be ≥ 1, found 0"),
        ("model.warm_start_lr=0", "model.warm_start_lr must be > 0, found 0.0"),
        ("model.warm_start_seed=-1", "model.warm_start_seed must be ≥ 0, found -1"),
        (
            "model=embedded",
            "unknown key 'model.warm_start_steps' for this model: it belongs to model=folder, model=smol",
        ),
    ],
)
def test_settings_that_contradict_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(["model=smollm2", "model.warm_start_steps=2", override])
    assert message in str(error.value)
    load_config(["model=smollm2", "task=gsm8k"])


def test_the_answer_stands_where_the_style_has_it() -> None:
    problem = Problem(0, "3-9+12:", "6", {"expression": "3 - 9 + 12"})
    endings = {AnswerStyle.hash: "#6", AnswerStyle.boxed: "\\boxed{6}", AnswerStyle.last_line: "\n6"}
    for style, ending in endings.items():
        text = worked_chain(problem, style)
        assert text == "3-9=-6+12=6" + ending
        assert extract_answer(text, style) == "6"
