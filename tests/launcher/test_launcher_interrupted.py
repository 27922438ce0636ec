"""The inline run, interrupted by real signals at unplanned moments, and resumed."""

import json
import signal
import time
from pathlib import Path

import pytest
from conftest import tiny_policy
from running import command, newest_run, nursery, wait_for
from transformers import PreTrainedTokenizerBase


def interrupt(base_folder: Path, tmp_path: Path, delay_s: float) -> Path:
    """Starts a run that would go on for ever and sends Ctrl-C a moment after its first policy update."""
    log = tmp_path / "log"
    process = nursery().start(command(base_folder, tmp_path, "steps=100000", "evaluation.every=0")[2:], log)
    wait_for(log, "policy 1/", process)
    time.sleep(delay_s)
    process.kill(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert "stopping at the next safe moment" in log.read_text()
    return newest_run(tmp_path)


@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.17, 0.31])
def test_whenever_it_comes_there_is_a_checkpoint_and_the_tickets_balance(
    base_folder: Path, tmp_path: Path, delay_s: float
) -> None:
    run_dir = interrupt(base_folder, tmp_path, delay_s)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["base_accuracy"] is not None
    tickets = summary["tickets"]
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert newest.name == f"step_{summary['versions']:06d}"


def test_resume_takes_the_runs_own_settings_and_says_what_changes(base_folder: Path, tmp_path: Path) -> None:
    run_dir = interrupt(base_folder, tmp_path, 0.1)
    done = json.loads((run_dir / "summary.json").read_text())["versions"]
    log = tmp_path / "again"
    # Nothing but where the run is: the rest is in its folder.
    more = [f"resume={run_dir}", f"steps={done + 2}", "algorithm.alpha=0.5"]
    assert nursery().start(more, log).wait(timeout=100) == 0, log.read_text()
    assert "changed for the rest of the run: algorithm.alpha: 1.5 → 0.5" in log.read_text()
    assert json.loads((run_dir / "summary.json").read_text())["versions"] == done + 3
    assert "alpha: 0.5" in (run_dir / "config.yaml").read_text()
    assert "groups_per_batch: 2" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("algorithm.groups_per_batch=3", "groups_per_batch"),
        ("seed=5", "written with another seed"),
        ("model.path={other}", "resume with the run's own"),
        ("task.max_response_tokens=11", "task.max_response_tokens must be ≥ 12, found 11"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_one_line(
    base_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, override: str, says: str
) -> None:
    other = tmp_path / "other"
    tiny_policy(len(tokenizer) + 1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    run_dir = interrupt(base_folder, tmp_path, 0.0)
    own = (run_dir / "config.yaml").read_text()
    log = tmp_path / "again"
    assert nursery().start([f"resume={run_dir}", override.format(other=other)], log).wait(200) == 2, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert "Traceback" not in log.read_text()
    assert (run_dir / "config.yaml").read_text() == own, "what was refused is not the run's"
