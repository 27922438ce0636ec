"""``scripts/evaluate.py`` on runs, checkpoints and plain folders; what it refuses, and greedy decoding underneath."""

import json
import math
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, tiny_overrides, tiny_policy
from transformers import PreTrainedTokenizerBase

from vapo_async.build import BaseModel, build_collector, build_evaluator
from vapo_async.collector.engine import GenerationRequest
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.collector.evaluator import Evaluator
from vapo_async.config import ChainSumTaskConfig, Config, DatasetTaskConfig, FolderModelConfig
from vapo_async.config.load import load_config
from vapo_async.evaluation import evaluation_config
from vapo_async.launcher.run import launch
from vapo_async.metrics.console import Console
from vapo_async.metrics.loggers import read_metrics
from vapo_async.schema import SAMPLE_LOG_PROB, Problem, Prompt, Ticket

main = runpy.run_path(str(REPOSITORY / "scripts" / "evaluate.py"))["main"]
CHANGED = ["steps=1", "algorithm.value_pretraining_steps=0", "task.max_terms=5", "evaluation.top_p=0.9"]
SMALL = ["task.max_response_tokens=12", "task.heldout_problems=8", "evaluation.problems=6"]


@pytest.fixture(scope="module")
def run_dir(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = tiny_overrides(base_folder, tmp_path_factory.mktemp("runs"))
    config = load_config([*overrides, *CHANGED])
    with Console() as console:
        return launch(config, console)[1]


def measured(arguments: list[str], tmp_path: Path) -> dict[str, Any]:
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert isinstance(out, dict)
    return out


def test_a_run_is_evaluated_with_its_own_settings(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = measured([str(run_dir)], tmp_path)
    assert (out["problems"], out["samples"], out["temperature"], out["top_p"]) == (4, 2, 1.0, 0.9)
    assert out["config"]["task"]["max_terms"] == 5
    assert list(out["pass_at_k"]) == ["1", "2"]
    assert out["pass_at_k"]["1"] == pytest.approx(out["avg_at_k"])
    assert 1 <= out["mean_response_tokens"] <= 12 and 0 <= out["truncated"] <= 1
    assert out["generated_tokens"] > 0 and out["tokens_per_s"] > 0
    printed = capsys.readouterr().out
    for label in ("avg@2", "pass@1", "pass@2", "greedy", "mean response", "cut by the limit", "speed"):
        assert label in printed
    assert "2 per problem at T = 1, top-p 0.9, and a greedy one" in printed
    assert str(run_dir / "config.yaml") in printed


def test_the_base_is_measured_as_training_measured_it(base_folder: Path, run_dir: Path, tmp_path: Path) -> None:
    """Same problems, limit, seed and judge: exactly the numbers of the run's step 0."""
    logged = next(row for row in read_metrics(run_dir) if row["step"] == 0 and "heldout_accuracy" in row)
    settings = [o for o in tiny_overrides(base_folder, tmp_path) if not o.startswith("model")]
    out = measured([str(base_folder), *settings, *CHANGED], tmp_path)
    assert out["mean_response_tokens"] == logged["heldout_response_length"]
    assert (out["avg_at_k"], out["avg_at_k_stderr"]) == (logged["heldout_accuracy"], logged["heldout_stderr"])


@pytest.mark.parametrize("inside", ["checkpoints/{step}", "checkpoints/{step}/policy"])
def test_every_way_to_name_a_checkpoint_means_the_same(run_dir: Path, inside: str) -> None:
    step = sorted(path.name for path in (run_dir / "checkpoints").iterdir())[-1]
    of_run = evaluation_config(str(run_dir), [])
    assert evaluation_config(str(run_dir / inside.format(step=step)), []) == of_run
    config, source = of_run
    assert source == run_dir / "config.yaml"
    assert config.model == FolderModelConfig(path=str(run_dir / "checkpoints" / step / "policy"))


def test_overrides_win_over_the_runs_settings(run_dir: Path) -> None:
    config, _ = evaluation_config(str(run_dir), ["evaluation.samples=7", "model.dtype=bfloat16"])
    assert (config.evaluation.samples, config.evaluation.problems, config.model.dtype) == (7, 4, "bfloat16")
    assert isinstance(config.task, ChainSumTaskConfig) and config.task.max_terms == 5
    other, _ = evaluation_config(str(run_dir), ["task=gsm8k", "task.max_response_tokens=64"])
    assert isinstance(other.task, DatasetTaskConfig) and other.task.answer_separator == "####"
    assert (other.task.max_response_tokens, other.evaluation.samples) == (64, 2)


def test_a_plain_folder_takes_the_shipped_settings(base_folder: Path, run_dir: Path, tmp_path: Path) -> None:
    out = measured([str(base_folder), *SMALL, "evaluation.samples=3"], tmp_path)
    assert (out["problems"], out["samples"], out["task"]) == (6, 3, "chain_sum")
    assert list(out["pass_at_k"]) == ["1", "2", "3"]
    assert math.isfinite(out["avg_at_k_stderr"])
    copied = tmp_path / "policy"
    shutil.copytree(next((run_dir / "checkpoints").iterdir()) / "policy", copied)
    assert evaluation_config(str(copied), [])[1] is None


def test_one_problem_has_no_standard_error(base_folder: Path, tmp_path: Path) -> None:
    out = measured([str(base_folder), *SMALL, "evaluation.problems=1", "evaluation.samples=1"], tmp_path)
    assert out["avg_at_k_stderr"] is None and out["greedy_stderr"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to evaluate"),
        (["evaluation.samples=2"], "nothing to evaluate"),
        (["{run}", "evaluation.sample=2"], "did you mean 'evaluation.samples'"),
        (["{run}", "evaluation.samples=0"], "evaluation.samples must be ≥ 1"),
        (["{run}", "evaluation.problems=9"], "task.heldout_problems = 8"),
        (["{run}", "model=embedded"], "leave out either it or model="),
        (["{run}", "{run}"], "one FOLDER at a time"),
        (["{run}", "--verbose"], "unknown option '--verbose'"),
        (["{run}", "--json"], "--json needs a file"),
        (["{run}", "--json={run}/nowhere/x.json"], "--json needs a file"),
        (["{run}/.."], "the newest is"),
        (["{run}/checkpoints/step_999999"], "model folder not found"),
        (["{empty}"], "no config.json"),
        (["{empty}/unfinished"], "no complete checkpoint"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], words: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    if "{empty}" in arguments:
        (tmp_path / "unfinished" / "checkpoints").rmdir()
    assert main([argument.format(run=run_dir, empty=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert len(error.splitlines()) == 1


def test_help_says_what_a_folder_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "a checkpoint" in capsys.readouterr().out


def test_temperature_zero_decodes_greedily(tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prompt = tiny_policy(len(tokenizer), seed=4), (3, 5, 13, 7, 16)
    engine = TransformersEngine(
        policy, eos_token_id=len(tokenizer), max_slots=3, max_length=32, temperature=0.0, seed=1
    )
    engine.submit(GenerationRequest(0, prompt, 5, 20))
    responses = []
    while engine.num_unfinished:
        responses += [completion.response for completion in engine.step()]
    expected = list(prompt)
    for _ in range(20):
        with torch.no_grad():
            expected.append(int(policy(torch.tensor([expected])).logits[0, -1].argmax()))
    assert [response.token_ids for response in responses] == [expected[len(prompt) :]] * 5
    assert all(response.log_probs == [0.0] * 20 for response in responses), "certain: log 1"


def test_top_p_is_the_evaluations_alone(tiny_config: Config, base_folder: Path) -> None:
    """A tiny one makes every sample the greedy response, and changes nothing of what is trained on."""
    base, prompts = BaseModel(base_folder, base_folder), [(3, 5, 13, 7, 16), (4, 9), (8,)]

    def with_top_p(top_p: float) -> Config:
        return replace(tiny_config, evaluation=replace(tiny_config.evaluation, top_p=top_p))

    greedy = replace(tiny_config, evaluation=replace(tiny_config.evaluation, temperature=0.0))
    expected = build_evaluator(greedy, base).sample(prompts, 3)
    assert build_evaluator(with_top_p(1e-6), base).sample(prompts, 3) == expected
    assert build_evaluator(with_top_p(1.0), base).sample(prompts, 3) != expected

    def trained_on(config: Config) -> list[list[float]]:
        collector = build_collector(config, base, 0)
        collector.start(Ticket(0, 0), Prompt(0, Problem(0, "", ""), "", prompts[0]))
        while not (finished := collector.step()):
            pass
        return [trajectory[SAMPLE_LOG_PROB].tolist() for trajectory in finished[0].group.unbind(0)]

    assert trained_on(with_top_p(1e-6)) == trained_on(with_top_p(1.0))


def test_streamed_responses_are_those_of_sample(tokenizer: PreTrainedTokenizerBase) -> None:
    def evaluator() -> Evaluator:
        policy = tiny_policy(len(tokenizer), seed=4)
        engine = TransformersEngine(policy, eos_token_id=1, max_slots=4, max_length=32)
        return Evaluator(engine, tokenizer, max_response_tokens=8, seed=1)

    prompts, again = [(3, 5), (4,), (7, 8, 9)], evaluator()
    streamed = dict(again.stream(prompts, 3))
    assert dict(again.stream(prompts, 3)) == streamed, "every evaluation starts from the same seed"
    assert [streamed[i] for i in range(3)] == evaluator().sample(prompts, 3)
    for responses in streamed.values():
        assert len(responses.texts) == 3 and max(responses.lengths) <= 8
        assert all(length == 8 for length, cut in zip(responses.lengths, responses.truncated, strict=True) if cut)
    assert any(any(responses.truncated) for responses in streamed.values())
    assert not all(all(responses.truncated) for responses in streamed.values())
