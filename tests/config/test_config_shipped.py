"""Every YAML file that we ship composes, fits its schema and passes the checks."""

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

import vapo_async.config
from vapo_async.config import (
    GROUPS,
    OVERLAYS,
    AnswerStyle,
    ChainSumTaskConfig,
    Config,
    DatasetTaskConfig,
    EmbeddedModelConfig,
    InlineLauncherConfig,
    KVCacheOnUpdate,
    RayLauncherConfig,
    SmolLM2ModelConfig,
    TorchLearnerConfig,
    TransformersEngineConfig,
    resolved_lead,
)
from vapo_async.config.algorithm import AdvantageKind, ImportanceKind
from vapo_async.config.help import field_docs
from vapo_async.config.load import (
    default_config_dir,
    flatten,
    group_choices,
    help_text,
    load_config,
    read_config,
    save_config,
)

CLUSTERS = "cluster"  # no group: what scripts/plan.py plans for
FILES = sorted(
    file
    for path in default_config_dir().rglob("*.yaml")
    if (file := path.relative_to(default_config_dir())).parts[0] != CLUSTERS
)
SCHEMAS = [Config, *(s for s in vars(vapo_async.config).values() if is_dataclass(s) and s is not Config)]
NEEDS = {"model=folder": ["model.path=somewhere"]}  # what a choice leaves to the user


def test_config_dir_holds_what_the_readme_promises() -> None:
    assert {str(f) for f in FILES} >= {"config.yaml", "algorithm/vapo.yaml", "task/gsm8k.yaml", "launcher/ray.yaml"}
    assert {f.parts[0] for f in FILES if len(f.parts) == 2} == {*GROUPS, *OVERLAYS}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_config_file_parses_and_passes_the_checks(file: Path) -> None:
    overrides = [] if len(file.parts) == 1 else [f"{file.parts[0]}={file.stem}"]
    config = load_config(overrides + [o for choice in overrides for o in NEEDS.get(choice, [])])
    for group, schemas in GROUPS.items():
        assert type(getattr(config, group)) in schemas.values()


@pytest.mark.parametrize("file", FILES, ids=str)
def test_config_file_begins_with_a_comment_for_the_help(file: Path) -> None:
    lines = (default_config_dir() / file).read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# ") and len(first) > 20


def test_config_default_run_has_the_right_types() -> None:
    config = load_config([])
    assert type(config.task) is ChainSumTaskConfig
    assert type(config.model) is EmbeddedModelConfig
    assert type(config.engine) is TransformersEngineConfig
    assert type(config.learner) is TorchLearnerConfig
    assert type(config.launcher) is RayLauncherConfig
    assert config.algorithm.advantage is AdvantageKind.gae
    assert config.algorithm.importance is ImportanceKind.decoupled
    assert config.task.answer_style is AnswerStyle.hash
    assert config.engine.kv_cache_on_update is KVCacheOnUpdate.recompute
    assert config.buffer.max_staleness >= 2 and resolved_lead(config.buffer) > 0
    assert config.evaluation.problems >= 256 and config.evaluation.samples == 4


def test_config_vapo_is_the_papers() -> None:
    a = load_config(["algorithm=vapo"]).algorithm
    assert (a.alpha, a.groups_per_batch, a.group_size, a.minibatches) == (0.05, 512, 16, 16)
    assert (a.policy_lr, a.critic_lr, a.value_pretraining_steps) == (1e-6, 2e-6, 50)
    assert (a.clip_low, a.clip_high, a.nll_coef, a.lmbda_critic, a.length_adaptive) == (0.2, 0.28, 0.1, 1.0, True)


@pytest.mark.parametrize(
    ("preset", "numbers"),
    [
        ("ppo", (8192, 1, 16, 0, "gae", 0.95, 0.95, False, "sequence", 0.2, 0.2, 0.0, 0.0, False, 0.0)),
        ("vc_ppo", (8192, 1, 16, 50, "gae", 0.95, 1.0, False, "sequence", 0.2, 0.2, 0.0, 0.0, False, 0.0)),
        ("grpo", (512, 16, 16, 0, "group", 0.95, 1.0, True, "sequence", 0.2, 0.2, 0.0, 0.04, False, 0.0)),
        ("dapo", (512, 16, 16, 0, "group", 0.95, 1.0, True, "token", 0.2, 0.28, 0.0, 0.0, True, 0.2)),
        ("vapo", (512, 16, 16, 50, "gae", 0.95, 1.0, True, "token", 0.2, 0.28, 0.1, 0.0, False, 0.0)),
    ],
)
def test_config_presets_are_the_papers(preset: str, numbers: tuple[object, ...]) -> None:
    """Sizes, pretraining, advantage, λ and λ_critic, length-adaptive, aggregation, clip, LM loss, KL, DAPO's two."""
    flat = flatten(load_config([f"algorithm={preset}"]))
    keys = (
        "groups_per_batch group_size minibatches value_pretraining_steps advantage lmbda lmbda_critic length_adaptive "
        "aggregation clip_low clip_high nll_coef kl_coef dynamic_sampling overlong_cache"
    )
    assert tuple(flat[f"algorithm.{key}"] for key in keys.split()) == numbers
    assert flat["algorithm.policy_lr"] == 1e-6
    assert flat["algorithm.importance"] == "decoupled"


@pytest.mark.parametrize("algorithm", ["vapo", "vapo_small"])
@pytest.mark.parametrize(
    ("ablation", "change"),
    [
        ("no_value_pretraining", {"value_pretraining_steps": 0}),
        ("no_decoupled_gae", {"lmbda_critic": 0.95}),
        ("no_length_adaptive_gae", {"length_adaptive": False}),
        ("no_clip_higher", {"clip_high": 0.2}),
        ("no_token_level_loss", {"aggregation": "sequence"}),
        ("no_positive_lm_loss", {"nll_coef": 0.0}),
        ("no_group_sampling", {"group_sampling": False, "group_size": 1}),
    ],
)
def test_config_ablation_takes_one_technique_away(algorithm: str, ablation: str, change: dict[str, object]) -> None:
    before = flatten(load_config([f"algorithm={algorithm}"]))
    after = flatten(load_config([f"algorithm={algorithm}", f"ablation={ablation}"]))
    if ablation == "no_group_sampling":  # as many responses
        change = change | {"groups_per_batch": {"vapo": 8192, "vapo_small": 256}[algorithm]}
    assert {key: value for key, value in after.items() if value != before[key]} == {
        f"algorithm.{key}": value for key, value in change.items()
    }


def test_config_without_groups_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(["ablation=no_group_sampling"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_config_experiment_is_laid_over_the_groups_and_under_the_command_line() -> None:
    config = load_config(["experiment=smollm2_gsm8k", "steps=2", "algorithm.group_size=8"])
    assert isinstance(config.task, DatasetTaskConfig) and isinstance(config.model, SmolLM2ModelConfig)
    assert config.task.answer_separator == "####" and config.task.max_response_tokens == 96
    assert (config.steps, config.algorithm.groups_per_batch, config.algorithm.group_size) == (2, 4, 8)
    assert config.algorithm.alpha == 0.05
    overridden = load_config(["experiment=smollm2_gsm8k", "launcher=inline", "model=embedded"])
    assert isinstance(overridden.launcher, InlineLauncherConfig) and isinstance(overridden.model, EmbeddedModelConfig)


def test_config_later_overrides_win_and_null_is_none() -> None:
    config = load_config(["steps=3", "steps=7", "algorithm.behaviour_weight_cap=null", "experiment=null"])
    assert config.steps == 7 and config.algorithm.behaviour_weight_cap is None


def test_config_text_with_signs_is_taken_when_quoted() -> None:
    assert load_config(['task.template="Solve: {question} = ?"']).task.template == "Solve: {question} = ?"


@pytest.mark.parametrize("overrides", [[], ["experiment=smollm2_gsm8k"], ["launcher=inline", "task=math"]])
def test_config_saved_file_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(overrides)
    save_config(config, tmp_path / "config.yaml", overrides)
    assert read_config(tmp_path / "config.yaml") == config
    for override in overrides:
        assert override in (tmp_path / "config.yaml").read_text()


def test_config_flatten_names_every_field_once() -> None:
    flat = flatten(load_config([]))
    assert flat["algorithm.alpha"] == 1.5 and flat["algorithm.importance"] == "decoupled" and flat["seed"] == 0


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_config_every_field_is_explained(schema: type[Any]) -> None:
    assert [name for name, doc in field_docs(schema).items() if not doc] == []
    assert schema.__doc__ and not schema.__doc__.startswith(f"{schema.__name__}("), "dataclass writes one otherwise"


def test_config_help_names_every_group_choice_and_field() -> None:
    text = help_text()
    for group, choices in group_choices().items():
        assert f"  {group}=\n" in text
        for choice in choices:
            assert f" {choice} " in text
    for overrides in ([], ["task=gsm8k", "launcher=inline"], ["model=smollm2"], ["model=folder", "model.path=x"]):
        for key in flatten(load_config(overrides)):
            assert f"  {key} = " in text
    assert "algorithm.alpha = 1.5" in text  # the default run's value, not the schema's
    assert "model.path = (required)" in text
    assert "S: no group older than this" in text
    assert max(len(line) for line in text.splitlines()) <= 125
