"""Every preset and every ablation trains: 5 updates of a policy that guesses; as slow tests, 20 of the main job."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from guessing_policy import guessing_overrides
from running import newest_run

from vapo_async.config.load import group_choices, load_config
from vapo_async.launcher.run import launch
from vapo_async.metrics.console import Console
from vapo_async.metrics.loggers import read_metrics

FEW, MANY = 5, 20
"""Updates of the policy."""
GROUPED = ("algorithm.groups_per_batch=8", "algorithm.group_size=8")
SINGLE = ("algorithm.groups_per_batch=64", "algorithm.group_size=1")
CHOICES = group_choices()

Train = Callable[..., list[dict[str, Any]]]
"""Of overrides: the metrics rows of the policy's updates."""


def runs(choices: Iterable[str]) -> list[Any]:
    """A few updates of each and, slowly, many."""
    slow = [pytest.mark.slow, pytest.mark.ray]
    return [pytest.param(c, n, marks=slow if n == MANY else ()) for n in (FEW, MANY) for c in choices]


@pytest.fixture
def train(steps: int, guessing_folder: Path, tmp_path: Path) -> Train:
    def few(*overrides: str) -> list[dict[str, Any]]:
        """In this process; the lag is real."""
        settings = (f"steps={FEW}", "algorithm.minibatches=2", "evaluation.every=0", "buffer.max_staleness=2")
        summary, run = launch(
            load_config([*guessing_overrides(guessing_folder, tmp_path), *settings, *overrides]), Console()
        )
        assert summary.status == "finished" and summary.tickets.balanced
        return updates(read_metrics(run), FEW)

    def many(*overrides: str) -> list[dict[str, Any]]:
        """Small batches of the embedded base, as a user starts it."""
        settings = (
            "experiment=small",
            f"steps={MANY}",
            "algorithm.minibatches=2",
            "evaluation.problems=16",
            "evaluation.samples=1",
            "evaluation.every=0",
            "checkpoint.every=0",
            "name=tiny",
            f"runs_dir={tmp_path}",
        )
        command = [sys.executable, str(REPOSITORY / "scripts" / "train_async.py"), *settings, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        run = newest_run(tmp_path)
        tickets = json.loads((run / "summary.json").read_text())["tickets"]
        assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
        return updates(read_metrics(run), MANY)

    return many if steps == MANY else few


def updates(rows: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
    found = [row for row in rows if row["step"] > 0 and "loss_objective" in row]
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    assert any(row["grad_norm_policy"] > 0 for row in found)
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("algorithm", "steps"), runs(CHOICES["algorithm"]))
def test_preset_trains(algorithm: str, steps: int, train: Train) -> None:
    """Many updates over Ray."""
    launcher = "ray" if steps == MANY else "inline"
    sizes = SINGLE if algorithm in ("ppo", "vc_ppo") else GROUPED
    pretraining = {"vapo": 3, "vapo_small": 3, "vc_ppo": 3}.get(algorithm, 0)
    overrides = (f"launcher={launcher}", f"algorithm.value_pretraining_steps={pretraining}", *sizes)
    rows = train(f"algorithm={algorithm}", *overrides)
    last = rows[-1]
    assert ("loss_critic" in last) == (algorithm not in ("grpo", "dapo"))
    assert ("loss_nll" in last) == (algorithm in ("vapo", "vapo_small"))
    assert ("loss_kl" in last) == (algorithm == "grpo")
    if algorithm == "dapo":
        assert all(row["groups_mixed"] == 1 for row in rows)
        assert last["tickets_refunded"] > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ablation", "steps"), runs(CHOICES["ablation"]))
def test_ablation_trains(ablation: str, steps: int, train: Train) -> None:
    sizes = SINGLE if ablation == "no_group_sampling" else GROUPED
    pretraining = () if ablation == "no_value_pretraining" else ("algorithm.value_pretraining_steps=3",)
    rows = train(f"ablation={ablation}", "launcher=inline", *sizes, *pretraining)
    assert ("loss_nll" in rows[-1]) == (ablation != "no_positive_lm_loss")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("importance", "steps"), runs(("naive", "a3po", "dis", "m2po")))
def test_off_policy_correction_trains_under_lag(importance: str, steps: int, train: Train) -> None:
    """Beside ``decoupled``, which the presets have; with the engine-mismatch corrections and V-trace in turn."""
    more = {
        "naive": ("algorithm.mismatch=tis", "algorithm.dual_clip=3"),
        "a3po": ("algorithm.value_clip=0.2",),
        "dis": (
            "algorithm.mismatch=icepop",
            "algorithm.mismatch_low=0.98",
            "algorithm.mismatch_high=1.02",
            "algorithm.clip_low=0.3",
            "algorithm.clip_high=5",
            "algorithm.critic_updates=2",
        ),
        "m2po": (
            "algorithm.m2po_threshold=1e-6",
            "algorithm.mismatch=mis",
            "algorithm.value_target=vtrace",
            "algorithm.overlong_filter=true",
        ),
    }[importance]
    rows = train(
        f"algorithm.importance={importance}",
        "launcher=inline",
        "buffer.lead=2",
        *GROUPED,
        "algorithm.value_pretraining_steps=3",
        *more,
    )
    assert rows[-1]["token_age"] > 0
    kept = [row["kept_share"] for row in rows]
    assert min(kept) < 1 if importance in ("dis", "m2po") else min(kept) == 1
