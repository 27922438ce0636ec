"""``scripts/plan.py`` from end to end: the plan, what it refuses, its exit codes."""

import json
import re
import runpy
from pathlib import Path

import pytest
from conftest import REPOSITORY

main = runpy.run_path(str(REPOSITORY / "scripts" / "plan.py"))["main"]
PAPER = ["experiment=paper_qwen2.5_32b", "cluster=h100_64", "--no-simulation"]


def test_a_plan_with_its_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster=laptop", "experiment=quick", "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    labels = ["plan ", "model ", "learner, the process, MiB", "engine, the process, MiB", "KV cache", "generation"]
    labels += [
        "publication",
        "step ",
        "it rests on",
        "simulated",
        "take buffer.max_staleness=",
        "the whole run: 2 + 4 ",
    ]
    for label in labels:
        assert label in printed
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["fits"] and data["misfits"] == []
    recommended, configured = data["simulation"]["recommended"], data["simulation"]["configured"]
    assert 0 <= recommended["lead"] <= recommended["max_staleness"]
    assert (configured["max_staleness"], configured["lead"]) == (4, 1)
    best = max(pair["groups_per_s"] for pair in data["simulation"]["pairs"])
    assert recommended["groups_per_s"] >= 0.95 * best
    # The learner limits this one: no simulated step is faster than learning and publication.
    assert 8 / best >= 0.99 * (data["learning_s"] + data["publication"]["transfer_s"])


def test_the_papers_run_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PAPER) == 0
    out, error = capsys.readouterr()
    assert error == "" and "simulated" not in out
    assert "Qwen/Qwen2.5-32B: policy of 32.76 billion parameters, critic of 31.99, bfloat16" in out
    assert "learner 40 (ZeRO-3) · engines 5 × 4 · evaluator 4 · idle 0 · in all 64" in out


def test_a_slow_pair_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a lead generation and learning take turns; with one the learner, which limits this run, is never idle."""
    quick = ["cluster=laptop", "experiment=quick"]
    assert main([*quick, "buffer.max_staleness=0"]) == 0
    share = re.search(
        r"note: buffer\.max_staleness=0 with buffer\.lead=0 reaches (\d+)% of the best throughput, \d with \d (\d+)%$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert share is not None and int(share[1]) < 95 <= int(share[2])
    assert main([*quick, f"--json={tmp_path / 'plan.json'}"]) == 0
    assert "of the best throughput, " not in capsys.readouterr().out
    data = json.loads((tmp_path / "plan.json").read_text())["simulation"]
    best = max(pair["groups_per_s"] for pair in data["pairs"])
    assert data["configured"]["groups_per_s"] >= 0.95 * best


def test_what_does_not_fit_is_exit_code_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main([*PAPER, "learner.zero_stage=1", "learner.ranks=48", f"--json={out}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("does not fit: ") for line in lines)
    assert "72 GPUs are asked for" in lines[0] and "GiB too much" in lines[1]
    data = json.loads(out.read_text())
    assert not data["fits"] and [misfit["component"] for misfit in data["misfits"]] == ["GPUs", "learner"]
    assert data["misfits"][1]["over_gib"] > 0


def test_lengths_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PAPER, "--median-tokens=1000", "--sigma", "0", "--prompt-tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert "log-normal, median 1,000, σ 0, cut at 20,480: 1,000 on average, after prompts of 100" in out
    assert "a batch      9,011,200 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment=quick"], "which cluster? give cluster=NAME"),
        (["cluster=h100_65"], "cluster=h100_65 is none of h100_128, h100_64, laptop"),
        (["cluster=laptop", "experiment=quik"], "unknown choice 'experiment=quik'"),
        (["cluster=laptop", "algorithm.groups=3"], "unknown key 'algorithm.groups'"),
        (["cluster=laptop", "--sigma=x"], "--sigma needs a number between 0 and 5, found 'x'"),
        (["cluster=laptop", "--sigma=50"], "--sigma needs a number between 0 and 5, found '50'"),
        (["cluster=laptop", "--sigma=nan"], "--sigma needs a number between 0 and 5, found 'nan'"),
        (["cluster=laptop", "--median-tokens"], "--median-tokens needs a number between 1 and 1e+09, found ''"),
        (
            ["cluster=laptop", "--median-tokens", "1e300"],
            "--median-tokens needs a number between 1 and 1e+09, found '1e",
        ),
        (["cluster=laptop", "--prompt-tokens", "9999"], "--prompt-tokens is 9999, expected at most task.max_prompt_to"),
        (["cluster=laptop", "--json", "/no/where/x.json"], "--json needs a file in a folder that can be written"),
        (["cluster=laptop", "model.dtype=bfloat16"], "model.dtype must be float32 for training, found 'bfloat16'"),
        ([*PAPER, "model.dtype=float16"], "model.dtype must be float32 for training, found 'float16'"),
        (["cluster=laptop", "--fast"], "unknown option '--fast'"),
        (["cluster=h100_64"], "learner.device is cpu, but the cluster has 8 GPUs in each node"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {told}") and error.count("\n") == 1


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "usage: python scripts/plan.py" in capsys.readouterr().out
