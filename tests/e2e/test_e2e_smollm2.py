"""A real language model, from its PyPI wheel, trained end to end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, SHARED_DATA

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # not ``vllm``, whose tests take minutes: the first takes an hour


def train(tmp_path: Path, experiment: str, *overrides: str, timeout_s: float) -> dict[str, Any]:
    """The closing summary."""
    script = str(REPOSITORY / "scripts" / "train_async.py")
    command = [sys.executable, script, f"experiment={experiment}", f"runs_dir={tmp_path}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(next((tmp_path / experiment).glob("*/summary.json")).read_text())
    assert summary["status"] == "finished" and summary["max_age"] <= summary["max_staleness"]
    return summary


@pytest.mark.timeout(6000)
def test_smollm2_learns_chain_sums_through_vllm(tmp_path: Path) -> None:
    """The warm start, which is made once and cached, comes before; the standard error of either accuracy is 0.02."""
    summary = train(tmp_path, "smollm2_chain_sum", timeout_s=5900)
    assert summary["evaluation"] == {"problems": 256, "samples": 4}
    assert summary["final_accuracy"] >= summary["base_accuracy"] + 0.15
    assert summary["wall_s"] < 90 * 60


@pytest.mark.skipif(not (SHARED_DATA / "gsm8k").exists(), reason="the real data is not here")
@pytest.mark.timeout(3600)
def test_smollm2_trains_on_gsm8k(tmp_path: Path) -> None:
    summary = train(tmp_path, "smollm2_gsm8k", "steps=3", timeout_s=3500)
    assert summary["versions"] == 4 and summary["optimizer_steps"] >= 6
