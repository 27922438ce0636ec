"""Every mistake in a configuration becomes one line that says what was found and what to do."""

from pathlib import Path

import pytest

from vapo_async.config import ConfigError
from vapo_async.config.load import default_config_dir, load_config, read_config

MISTAKES = [
    (["algorithm.aplha=0.5"], "unknown key 'algorithm.aplha'; did you mean 'algorithm.alpha'?"),
    (["max_staleness=3"], "unknown key 'max_staleness'; did you mean 'buffer.max_staleness'?"),
    (["zzzz=1"], "unknown key 'zzzz'"),
    (["hydra.run.dir=x"], "unknown key 'hydra.run.dir'"),
    (
        ["launcher=inline", "launcher.port=3"],
        "unknown key 'launcher.port' for this launcher: it belongs to launcher=ray",
    ),
    (["task.train=x"], "unknown key 'task.train' for this task: it belongs to task=gsm8k, task=math"),
    (["engine=vlm"], "unknown choice 'engine=vlm'; choices: transformers"),
    (["task=gms8k"], "unknown choice 'task=gms8k'; choices: chain_sum, gsm8k, math; did you mean 'gsm8k'?"),
    (["experiment=quik"], "did you mean 'quick'?"),
    (["ablation=no_cliphigher"], "did you mean 'no_clip_higher'?"),
    (
        ["algorithm=ppo", "ablation=no_clip_higher"],
        "changes nothing here: the technique is off already",
    ),
    (
        ["algorithm=grpo", "ablation=no_decoupled_gae"],
        "changes nothing here: algorithm.lmbda_critic has no effect with algorithm.advantage=group",
    ),
    (["algorithm=dapo", "ablation=no_group_sampling"], "algorithm.group_sampling must be true with"),
    (["launcher=null"], "unknown choice 'launcher=null'; choices: inline, ray"),
    (["algorithm=base_schema"], "unknown choice 'algorithm=base_schema'"),
    (["algorithm={alpha: 1}"], "unknown choice 'algorithm={alpha: 1}'"),
    (["steps=abc"], "steps must be an integer, found 'abc'"),
    (["steps=1.5"], "steps must be an integer, found '1.5'"),
    (["steps=null"], "steps must be an integer, found 'null'"),
    (["steps=[1]"], "steps must be an integer, found '[1]'"),
    (["steps="], "steps must be an integer, found ''"),
    (["algorithm.alpha=much"], "algorithm.alpha must be a number, found 'much'"),
    (["algorithm.length_adaptive=2.5"], "algorithm.length_adaptive must be true or false, found '2.5'"),
    (["buffer.lead=far"], "buffer.lead must be an integer or null, found 'far'"),
    (["algorithm.aggregation=tokn"], "must be one of token, sequence, found 'tokn'; did you mean 'token'?"),
    (["buffer={max_staleness: 1}"], "'buffer' is a section: set its fields, for example buffer.max_staleness=…"),
    (
        ["launcher.rollout_resources=3"],
        "launcher.rollout_resources must be names with amounts, as in {name: 1}, found '3'",
    ),
    (["launcher.rollout_resources={engines: many}"], "names with amounts, as in {name: 1}, found '{engines: many}'"),
    (["launcher.learner_resources={big: 0}"], "launcher.learner_resources.big must be > 0, found 0"),
    (["foo"], "malformed override 'foo': write key=value"),
    (["=3"], "malformed override '=3'"),
    (["--multirun"], "unknown option '--multirun'"),
    (["+steps=1"], "malformed override '+steps=1'"),
    (["~steps"], "malformed override '~steps'"),
    (["task@x=math"], "malformed override 'task@x=math'"),
    (["steps=1,2"], "malformed override 'steps=1,2': one run takes one value"),
    (
        ["task.template=Solve: {question}"],
        "malformed override 'task.template=Solve: {question}': cannot read the value",
    ),
    (
        ["experiment=paper_qwen2.5_32b", "learner=torch"],
        "experiment=paper_qwen2.5_32b sets learner.ranks, which learner=torch has not: leave learner= out, or copy ",
    ),
    (
        ["launcher=inline", "experiment=paper_qwen2.5_32b"],
        "sets launcher.rollout_workers, which launcher=inline has not: leave launcher= out, or copy ",
    ),
    (["experiment=paper_qwen2.5_32b", "engine=transformers"], "experiment/paper_qwen2.5_32b.yaml and change that"),
    (["model=folder"], "model.path is required: give model.path=…"),
    (["name=${oc.env:SURELY_NOT_SET}"], "SURELY_NOT_SET"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_config_mistake_is_told_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_folder_without_a_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml in the configuration folder"):
        load_config([], tmp_path)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("algorithm:\n  aplha: 1\n", "aplha"),
        ("steps: many\n", "many"),
        ("learner:\n  ranks: 2\n", "learner.ranks: Key 'ranks' not in 'TorchLearnerConfig'"),
        ("defaults:\n  - override /task: nowhere\n", "nowhere"),
        ("steps: [1\n", "expected"),
    ],
)
def test_config_mistake_in_an_experiment_file_is_one_line(yaml: str, message: str, tmp_path: Path) -> None:
    for source in default_config_dir().rglob("*.yaml"):
        target = tmp_path / source.relative_to(default_config_dir())
        target.parent.mkdir(exist_ok=True)
        target.write_text(source.read_text())
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml}")
    with pytest.raises(ConfigError) as caught:
        load_config(["experiment=mine"], tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


SCHEMAS = (
    "schemas: {algorithm: base, task: chain_sum, model: embedded, "
    "engine: transformers, learner: torch, launcher: ray}\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the configuration"),
        ("a: [", "is not valid YAML"),
        ("- 1", "it has no 'schemas'"),
        ("steps: 3", "it has no 'schemas'"),
        ("schemas: {task: foo}", "schemas.algorithm is None, expected one of base"),
        (SCHEMAS + "stepz: 3", "stepz"),
        (SCHEMAS + "buffer: {max_staleness: -1}", "buffer.max_staleness must be ≥ 0"),
    ],
)
def test_config_saved_file_that_is_broken_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
