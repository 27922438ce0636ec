import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vapo_async.config import ChainSumTaskConfig, ConfigError, EmbeddedModelConfig
from vapo_async.models import embedded
from vapo_async.models.cache import CACHE_VARIABLE, cache_root, ensure_folder
from vapo_async.models.embedded import default_heldout_questions, embedded_recipe, ensure_embedded
from vapo_async.models.pretrain import new_model, pretrain
from vapo_async.prompts.tasks import heldout_chains

TINY = EmbeddedModelConfig(hidden_size=32, num_layers=1, pretrain_steps=3, habit_steps=2, pretrain_batch_tokens=256)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    lines: list[str] = []
    made = ensure_embedded(replace(TINY, cache_dir=str(cache)), lines.append)
    assert "step 5/5" in lines[-2] and "0 s left" in lines[-2]
    assert lines[-1].startswith("embedded model ready") and str(made) in lines[-1]
    return made


def test_the_folder_is_an_ordinary_one(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    ids = tokenizer("3-9+2:", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4).shape[1] <= ids.shape[1] + 4


def test_the_recipe_file_tells_what_was_made(folder: Path) -> None:
    made = json.loads((folder / "recipe.json").read_text())
    assert made["recipe"] == embedded_recipe(TINY)
    assert 0 <= made["quality"]["accuracy"] <= 1
    assert set(made["quality"]["accuracy_by_terms"]) == {str(n) for n in range(2, 13)}


def test_the_second_call_takes_the_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "pretrain", lambda *_: pytest.fail("pretrained again"))
    lines: list[str] = []
    for same in (TINY, replace(TINY, dtype="bfloat16"), replace(TINY, critic_path="x")):
        assert ensure_embedded(replace(same, cache_dir=str(cache)), lines.append) == folder
    assert lines == []
    assert [entry.name for entry in cache.iterdir() if not entry.name.startswith(".")] == [folder.name]


@pytest.mark.parametrize("change", [{"pretrain_seed": 1}, {"habit_slip_rate": 0.1}, {"hidden_size": 64}])
def test_another_recipe_is_another_folder(change: dict[str, float]) -> None:
    assert embedded_recipe(replace(TINY, **change)) != embedded_recipe(TINY)


def test_pretraining_is_the_seeds_and_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (pretrain(replace(TINY, pretrain_seed=s), lambda _: None) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert not one.training


def test_the_default_shape_is_small_and_of_head_size_32() -> None:
    model = new_model(EmbeddedModelConfig())
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert model.config.hidden_size // model.config.num_attention_heads == 32


def test_nothing_held_out_by_default_is_pretrained_on() -> None:
    assert {p.question for p in heldout_chains(ChainSumTaskConfig())} <= default_heldout_questions()


def test_a_build_that_dies_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "made"

    def die(unfinished: Path) -> None:
        (unfinished / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        ensure_folder(target, die, lambda: None)
    assert not target.exists()
    killed = tmp_path / ".building-made-killed"
    killed.mkdir()
    made = ensure_folder(target, lambda unfinished: unfinished.joinpath("whole").touch(), lambda: None)
    assert [entry.name for entry in made.iterdir()] == ["whole"]
    assert not killed.exists()


def _build_slowly(root: str, name: str) -> None:
    def build(unfinished: Path) -> None:
        import time

        (Path(root) / f"builder-{name}").touch()
        time.sleep(0.5)
        (unfinished / "by").write_text(name)

    ensure_folder(Path(root) / "made", build, lambda: (Path(root) / f"waited-{name}").touch())


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_build_slowly, args=(str(tmp_path), name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert len(list(tmp_path.glob("builder-*"))) == 1
    assert (tmp_path / "made" / "by").is_file()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "variable"))
    assert cache_root(None) == tmp_path / "variable"
    assert cache_root(str(tmp_path / "given")) == tmp_path / "given"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root(None).name == "vapo_async"


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"cache folder .* cannot be written .*set model.cache_dir or \$VAPO_ASYNC_CACHE"
    ):
        cache_root(str(tmp_path / "file"))


@pytest.mark.slow
def test_the_default_base_is_what_reinforcement_learning_needs(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    made = ensure_embedded(EmbeddedModelConfig(cache_dir=str(tmp_path)), print)
    quality = json.loads((made / "recipe.json").read_text())["quality"]
    assert 0.12 <= quality["accuracy"] <= 0.27
    assert quality["direct_share"] < 0.2
