"""Whole runs: engine and learner are compared with every batch, and a faulty engine ends the run with its worst tokens.

The faults are put into the rollout engine between the configuration and the run; everything else is the real program.
"""

import dataclasses
import json
import re
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, tiny_overrides
from running import FEW_PROBLEMS, command, newest_run, start
from torch import Tensor

import vapo_async.launcher.inline
from vapo_async.build import BaseModel, build_collector
from vapo_async.collector.collector import Collector
from vapo_async.collector.engine import GenerationRequest
from vapo_async.config import Config, ConfigError, resolved_max_mismatch
from vapo_async.config.load import load_config

main: Callable[[list[str]], int] = runpy.run_path(str(REPOSITORY / "scripts" / "train_async.py"))["main"]
OVERRIDES = (FEW_PROBLEMS, "buffer.max_staleness=4", "buffer.lead=1", "algorithm.policy_lr=3e-3")


def rows_of(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


@pytest.mark.parametrize("extra", [(), ("launcher.overlap_steps=4", "algorithm.importance=a3po")], ids=str)
def test_every_batch_of_a_run_that_lags_is_measured(base_folder: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    assert main([*tiny_overrides(base_folder, tmp_path), *OVERRIDES, "steps=8", *extra]) == 0
    rows = rows_of(newest_run(tmp_path))
    assert len(rows) == 9
    assert sum(row["age_max"] > 0 for row in rows[2:]) >= 5, "most batches hold tokens of older weights"
    for row in rows:
        assert row["engine_mismatch_tokens"] > 0
        assert row["engine_mismatch_max"] < 1e-4
        assert row["engine_mismatch_outside"] == 0


def hotter(config: Config, base: BaseModel, worker: int) -> Collector:
    engine = dataclasses.replace(config.engine, temperature=1.2)  # type: ignore[type-var]
    return build_collector(dataclasses.replace(config, engine=engine), base, worker)


def other_prompts(config: Config, base: BaseModel, worker: int) -> Collector:
    """What another chat template does: a token that the trajectory does not have."""
    collector = build_collector(config, base, worker)
    submit = collector._engine.submit

    def submit_more(request: GenerationRequest) -> None:
        submit(dataclasses.replace(request, prompt_token_ids=(5, *request.prompt_token_ids)))

    collector._engine.submit = submit_more  # type: ignore[method-assign]
    return collector


def stale(config: Config, base: BaseModel, worker: int) -> Collector:
    """Takes each version's number, never its weights."""
    collector = build_collector(config, base, worker)
    load = collector._engine.load_weights

    def load_nothing(version: int, tensors: Mapping[str, Tensor] | None) -> None:
        load(version, None)

    collector._engine.load_weights = load_nothing  # type: ignore[method-assign]
    return collector


def assert_told(capsys: pytest.CaptureFixture[str]) -> str:
    """One line, a heading, five tokens; returns the last of these."""
    told = capsys.readouterr().err
    assert "Traceback" not in told
    lines = told[told.index("error: ") :].strip().splitlines()
    assert lines[0].startswith("error: engine and learner disagree about the same weights")
    assert "limit is 0.002 (engine.max_mismatch)" in lines[0]
    assert len(lines) == 7 and all(": id " in line and "log-prob" in line for line in lines[2:])
    return lines[-1]


@pytest.mark.parametrize("fault", [hotter, other_prompts])
def test_a_faulty_engine_ends_the_run_at_its_first_batch(
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[..., Any],
) -> None:
    monkeypatch.setattr(vapo_async.launcher.inline, "build_collector", fault)
    assert main([*tiny_overrides(base_folder, tmp_path), *OVERRIDES]) == 1
    assert " '" in assert_told(capsys), "the learner's tokenizer gives the token's text"
    assert rows_of(newest_run(tmp_path)) == []


def test_weights_that_never_arrive_end_the_run_after_the_first_policy_update(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vapo_async.launcher.inline, "build_collector", stale)
    assert main([*tiny_overrides(base_folder, tmp_path), *OVERRIDES, "steps=8"]) == 1
    assert "version 2:" in assert_told(capsys)  # version 1 has the base's weights still: value pretraining
    rows = rows_of(newest_run(tmp_path))
    assert [row["step"] for row in rows] == [0, 1, 2][: len(rows)] and len(rows) >= 2


def test_weights_that_do_not_arrive_at_a_resume_end_it(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_overrides(base_folder, tmp_path), *OVERRIDES]
    assert main([*overrides, "steps=3"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(vapo_async.launcher.inline, "build_collector", stale)
        assert main([*overrides, "steps=6", "resume=auto"]) == 1
    assert re.search("version [45]:", assert_told(capsys)), "at once, or once responses are whole that it began"
    assert main([*overrides, "steps=6", "resume=auto"]) == 0, "with an engine that takes them the run goes on"


@pytest.mark.slow
@pytest.mark.ray
def test_over_ray_the_message_comes_whole(base_folder: Path, tmp_path: Path) -> None:
    """A limit below rounding: every engine is over it."""
    log = tmp_path / "log"
    arguments = command(base_folder, tmp_path, "launcher=ray", "evaluation.every=0", "engine.max_mismatch=1e-12")
    assert start(arguments, log).wait(timeout=200) == 1, log.read_text()
    told = log.read_text()
    assert "Traceback" not in told
    lines = told[told.index("error: ") :].strip().splitlines()
    assert "limit is 1e-12 (engine.max_mismatch)" in lines[0]
    assert len([line for line in lines if ", version 0: id " in line and "log-prob" in line]) == 5
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        ((), 0.002),
        (("engine.max_mismatch=0.3",), 0.3),
        (("engine=vllm", "launcher=ray"), 0.002),
        (("engine=vllm", "launcher=ray", "engine.dtype=bfloat16"), 0.1),
        (("engine=vllm", "launcher=ray", "engine.dtype=bfloat16", "engine.max_mismatch=0.01"), 0.01),
    ],
    ids=str,
)
def test_the_limit_goes_by_what_both_compute_in(overrides: tuple[str, ...], limit: float) -> None:
    assert resolved_max_mismatch(load_config(list(overrides))) == limit


@pytest.mark.parametrize(
    "override", ["learner.mismatch_versions=-1", "engine.max_mismatch=0", "engine.max_mismatch=nan"]
)
def test_limits_out_of_range_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{override.partition('=')[0]} must be"):
        load_config([override])
