"""Every preset and every ablation trains in the main job, with small batches of the embedded base: 5 updates of each
preset and of the ablations that change most; 20 updates of all, which are slow tests."""

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from vapo_async.config.load import group_choices

FEW, MANY = 5, 20
"""Updates of the policy."""
SMALL = (
    "experiment=small",
    "algorithm.minibatches=2",
    "evaluation.problems=16",
    "evaluation.samples=1",
    "evaluation.every=0",
    "checkpoint.every=0",
)
GROUPED = ("algorithm.groups_per_batch=8", "algorithm.group_size=8")
SINGLE = ("algorithm.groups_per_batch=64", "algorithm.group_size=1")
CHOICES = group_choices()
OTHER_COLUMNS = ("no_group_sampling", "no_positive_lm_loss", "no_value_pretraining")
"""Ablations that change what is measured, or in which batches; the others change numbers."""


def runs(choices: Iterable[str], *kept: str) -> list[Any]:
    """A few updates of those ``kept`` and many, slowly, of all."""
    choices = list(choices)
    return [(c, FEW) for c in choices if c in kept] + [pytest.param(c, MANY, marks=pytest.mark.slow) for c in choices]


def train(tmp_path: Path, steps: int, *overrides: str) -> list[dict[str, Any]]:
    """The metrics rows of the policy's updates."""
    script = REPOSITORY / "scripts" / "train_async.py"
    command = [sys.executable, str(script), f"runs_dir={tmp_path}", f"steps={steps}", *SMALL]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    run = next((tmp_path / "small").iterdir())
    tickets = json.loads((run / "summary.json").read_text())["tickets"]
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
    updates = [row for row in rows if row["step"] > 0 and "loss_objective" in row]
    assert [row["step"] for row in updates] == list(range(1, steps + 1))
    assert any(row["grad_norm_policy"] > 0 for row in updates)
    return updates


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("algorithm", "steps"), runs(CHOICES["algorithm"], *CHOICES["algorithm"]))
def test_preset_trains(algorithm: str, steps: int, tmp_path: Path) -> None:
    """In Ray where there are many updates, and dynamic sampling always."""
    launcher = "ray" if steps == MANY or algorithm == "dapo" else "inline"
    sizes = SINGLE if algorithm in ("ppo", "vc_ppo") else GROUPED
    pretraining = {"vapo": 3, "vapo_small": 3, "vc_ppo": 3}.get(algorithm, 0)
    overrides = (f"launcher={launcher}", f"algorithm.value_pretraining_steps={pretraining}", *sizes)
    rows = train(tmp_path, steps, f"algorithm={algorithm}", *overrides)
    last = rows[-1]
    assert ("loss_critic" in last) == (algorithm not in ("grpo", "dapo"))
    assert ("loss_nll" in last) == (algorithm in ("vapo", "vapo_small"))
    assert ("loss_kl" in last) == (algorithm == "grpo")
    if algorithm == "dapo":
        assert all(row["groups_mixed"] == 1 for row in rows)
        assert last["tickets_refunded"] > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("ablation", "steps"), runs(CHOICES["ablation"], *OTHER_COLUMNS))
def test_ablation_trains(ablation: str, steps: int, tmp_path: Path) -> None:
    sizes = SINGLE if ablation == "no_group_sampling" else GROUPED
    pretraining = () if ablation == "no_value_pretraining" else ("algorithm.value_pretraining_steps=3",)
    rows = train(tmp_path, steps, f"ablation={ablation}", "launcher=inline", *sizes, *pretraining)
    assert ("loss_nll" in rows[-1]) == (ablation != "no_positive_lm_loss")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("importance", "steps"), runs(("naive", "a3po", "dis", "m2po"), "naive", "dis"))
def test_off_policy_correction_trains_under_lag(importance: str, steps: int, tmp_path: Path) -> None:
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
        tmp_path,
        steps,
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
