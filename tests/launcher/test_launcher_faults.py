"""A full disk, broken checkpoints and a second Ctrl-C, through the command line: one line, and the run goes on."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from running import assert_same_end, command, newest_run, nursery, start, wait_for

from vapo_async.checkpoint import fault, list_checkpoints, newest_whole


def check_ended_by_full_disk(log: Path, run_dir: Path, reason: str) -> None:
    """One line says what, one what to go on from; the checkpoint before is as it was."""
    (first,) = (run_dir / "checkpoints").iterdir()  # nothing half-written is left
    *_, before, last = log.read_text().strip().splitlines()
    assert last.startswith("error: checkpoint not written (") and reason in last
    assert last.endswith(f"the last one is {first}")
    assert before.strip() == f"resume=auto goes on from {first}"
    assert "Traceback" not in log.read_text()
    assert newest_whole(run_dir, pytest.fail) == first


def test_a_limit_on_file_sizes_ends_the_run_with_one_line(base_folder: Path, tmp_path: Path) -> None:
    """A real limit: the first checkpoint's empty optimizer fits, the one after a batch, twice a model, does not."""
    limit_kb = (base_folder / "model.safetensors").stat().st_size * 3 // 2 // 1024
    shell = f'ulimit -f {limit_kb}; exec "$@"'
    log = tmp_path / "log"
    arguments = command(base_folder, tmp_path / "runs", "checkpoint.every=1", "steps=3")
    assert start(["bash", "-c", shell, "bash", *arguments], log).wait(timeout=200) == 1, log.read_text()
    check_ended_by_full_disk(log, newest_run(tmp_path / "runs"), "File too large")


def test_a_disk_that_fills_up_under_the_metrics_is_one_line_too(base_folder: Path, tmp_path: Path) -> None:
    """The limit comes while the run is at work, one byte above what it has written."""
    log = tmp_path / "log"
    run = nursery().start(command(base_folder, tmp_path / "runs", "checkpoint.every=0", "steps=100000")[2:], log)
    wait_for(log, "policy 1/", run)
    size = (newest_run(tmp_path / "runs") / "metrics.jsonl").stat().st_size + 1
    psutil.Process(run.pid).rlimit(psutil.RLIMIT_FSIZE, (size, size))
    assert run.wait(60) == 1, log.read_text()
    *_, last = log.read_text().strip().splitlines()
    assert last == "error: the run folder cannot be written to: File too large; make room, resume=auto"
    assert "the run leaves no checkpoint" in log.read_text() and "Traceback" not in log.read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_room_lets_it_go_on(
    base_folder: Path, tmp_path: Path, small_disk: Path
) -> None:
    log = tmp_path / "log"
    arguments = command(base_folder, small_disk, "checkpoint.every=1", "checkpoint.keep=1", "steps=2")[2:]
    assert nursery().start(arguments, log).wait(100) == 1, log.read_text()
    check_ended_by_full_disk(log, newest_run(small_disk), "No space left on device")
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert nursery().start([*arguments, "resume=auto"], log).wait(100) == 0, log.read_text()
    roomy = command(base_folder, tmp_path / "roomy", "checkpoint.every=1", "steps=2")[2:]
    assert nursery().start(roomy, log).wait(100) == 0, log.read_text()
    assert_same_end(newest_run(small_disk), newest_run(tmp_path / "roomy"))


def test_a_truncated_checkpoint_costs_a_warning_and_the_batches_since_the_one_before(
    base_folder: Path, tmp_path: Path
) -> None:
    log, runs_dir = tmp_path / "log", tmp_path / "runs"
    every = ("checkpoint.every=1", "evaluation.every=0")
    assert nursery().start(command(base_folder, runs_dir, *every, "steps=2")[2:], log).wait(100) == 0, log.read_text()
    run_dir = newest_run(runs_dir)
    whole, broken = list_checkpoints(run_dir)
    os.truncate(broken / "policy" / "model.safetensors", 1000)
    resume = [f"runs_dir={runs_dir}", "name=tiny", "resume=auto", "steps=4"]
    assert nursery().start(resume, log).wait(100) == 0, log.read_text()
    words = " ".join(log.read_text().split())
    assert f"warning: the checkpoint {broken} is broken and left out: policy/model.safetensors has 1,000 bytes" in words
    assert f"resumed from {whole}: 2 of 5 batches done" in words
    undisturbed = command(base_folder, tmp_path / "undisturbed", *every, "steps=4")[2:]
    assert nursery().start(undisturbed, log).wait(100) == 0, log.read_text()
    assert_same_end(run_dir, newest_run(tmp_path / "undisturbed"))
    for checkpoint in list_checkpoints(run_dir):
        (checkpoint / "flow.json").unlink()
    assert nursery().start([*resume[:2], f"resume={run_dir}"], log).wait(100) == 2
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"error: no whole checkpoint in {run_dir}/checkpoints (step_000005: flow.json: No such file")
    assert "step_000004: flow.json: No such file" in last and "Traceback" not in log.read_text()


@pytest.mark.parametrize("where", ["learn", "save"])
def test_a_second_ctrl_c_leaves_at_once_wherever_the_run_is(base_folder: Path, tmp_path: Path, where: str) -> None:
    log, runs_dir = tmp_path / "log", tmp_path / "runs"
    long_learn = ["algorithm.epochs=100000"] if where == "learn" else []
    arguments = command(base_folder, runs_dir, "checkpoint.every=1", "steps=200", *long_learn)[2:]
    run = nursery().start(arguments, log)

    def there() -> bool:
        root = runs_dir / "tiny"
        if where == "save":
            return any(root.glob("*/checkpoints/.step_00000[2-9].partial"))
        return any(root.glob("*/checkpoints/step_000000/complete"))

    while not there():
        assert run.poll() is None, log.read_text()
        time.sleep(0.0005)
    if where == "learn":
        time.sleep(1.0)
    run.kill(signal.SIGINT)
    time.sleep(0.5 if where == "learn" else 0.01)
    assert run.poll() is None, "the first one waits for a safe moment"
    since = time.monotonic()
    run.kill(signal.SIGINT)
    assert run.wait(30) == 130, log.read_text()
    took_s = time.monotonic() - since
    assert took_s < 3, f"{took_s:.1f} s"
    print(f"left {took_s:.2f} s after the second signal")
    assert "left at once; resume=auto goes on" in log.read_text() and "Traceback" not in log.read_text()
    run_dir = newest_run(runs_dir)
    for checkpoint in list_checkpoints(run_dir):
        assert fault(checkpoint) is None
    shutil.rmtree(run_dir)
