"""Checkpoint folders appear whole or not at all, and what broke later is seen before it is used."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vapo_async.checkpoint import fault, find_resume, list_checkpoints, newest_whole, write_checkpoint
from vapo_async.config import ConfigError, RunError


def write(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "weights").write_text("weights")


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 30):
        assert write_checkpoint(tmp_path, step, 2, write).name == f"step_{step:06d}"
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000010", "step_000030"]


def test_a_failure_leaves_the_one_before_intact(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1, 1, write)

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError) as caught:
        write_checkpoint(tmp_path, 2, 1, fail)
    assert str(caught.value) == (
        f"checkpoint not written ([Errno 28] No space left on device); the last one is {first}"
    )
    assert list((tmp_path / "checkpoints").iterdir()) == [first], "the partial folder is gone"
    assert (first / "policy" / "weights").read_text() == "weights"
    write_checkpoint(tmp_path, 2, 1, write)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002"]


def test_a_file_that_the_system_refuses_to_write(tmp_path: Path) -> None:
    """A real limit of 100 kB per file, a real safetensors file of 400 kB."""
    script = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from vapo_async.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
small, large = torch.zeros(100), torch.zeros(100_000)
for step, tensor in ((1, small), (2, large)):
    write_checkpoint(Path(sys.argv[1]), step, 1, lambda folder: save_file({"a": tensor}, folder / "a.safetensors"))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    first = tmp_path / "checkpoints" / "step_000001"
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("vapo_async.checkpoint.CheckpointError: checkpoint not written (")
    assert "File too large" in last_line and last_line.endswith(f"the last one is {first}")
    assert list(first.parent.iterdir()) == [first]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(RunError, match=r"checkpoint not written \(.*File exists.*the last one is none"):
        write_checkpoint(tmp_path, 1, 1, write)


def test_a_kill_while_deleting_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Killed for real before every single deletion that a checkpoint makes; the next one clears up."""
    script = """
import os, shutil, signal, sys
from pathlib import Path
from vapo_async.checkpoint import write_checkpoint
run_dir, deletions = Path(sys.argv[1]), int(sys.argv[2])
def write(folder):
    for name in "abc":
        (folder / name).write_text("x")
write_checkpoint(run_dir, 1, 1, write)
def hook(event, args):
    global deletions
    if event == "os.remove":
        deletions -= 1
        if deletions < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
write_checkpoint(run_dir, 2, 1, write)
"""
    for deletions in itertools.count():
        run_dir = tmp_path / str(deletions)
        done = subprocess.run([sys.executable, "-c", script, str(run_dir), str(deletions)], timeout=120)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert list_checkpoints(run_dir)
        for checkpoint in list_checkpoints(run_dir):
            assert {path.name for path in checkpoint.iterdir()} == {"a", "b", "c", "complete"}
        last = write_checkpoint(run_dir, 3, 1, write)
        assert list((run_dir / "checkpoints").iterdir()) == [last]
    assert deletions >= 4, "three files and the mark"


def test_a_step_written_again_replaces_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, 2, write)
    last = write_checkpoint(tmp_path, 3, 2, lambda folder: (folder / "new").touch())
    assert list((tmp_path / "checkpoints").iterdir()) == [last]
    assert (last / "new").exists() and fault(last) is None


def test_a_kill_while_a_step_is_written_again_leaves_one_of_the_two(tmp_path: Path) -> None:
    """Killed for real before every renaming and every deletion, with a single checkpoint kept."""
    script = """
import os, signal, sys
from pathlib import Path
from vapo_async.checkpoint import write_checkpoint
run_dir, changes = Path(sys.argv[1]), int(sys.argv[2])
write_checkpoint(run_dir, 1, 1, lambda folder: (folder / "a").write_text("old"))
def hook(event, args):
    global changes
    if event in ("os.remove", "os.rename", "os.rmdir"):
        changes -= 1
        if changes < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
write_checkpoint(run_dir, 1, 1, lambda folder: (folder / "a").write_text("new"))
"""
    seen = []
    for changes in itertools.count():
        run_dir = tmp_path / str(changes)
        done = subprocess.run([sys.executable, "-c", script, str(run_dir), str(changes)], timeout=120)
        seen.append((newest_whole(run_dir, pytest.fail) / "a").read_text())
        last = write_checkpoint(run_dir, 1, 1, write)
        assert list((run_dir / "checkpoints").iterdir()) == [last]
        if done.returncode == 0:
            break
    assert len(seen) >= 5 and seen == sorted(seen, reverse=True) and {*seen} == {"old", "new"}


def test_the_manifest_has_size_and_checksum_of_every_file(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, 1, 1, write)
    manifest = json.loads((checkpoint / "complete").read_text())
    digest = hashlib.sha256(b"weights").hexdigest()
    assert manifest == {"files": {"policy/weights": {"bytes": 7, "sha256": digest}}}


def damage_size(checkpoint: Path) -> None:
    (checkpoint / "policy" / "weights").write_text("weigh")


def damage_content(checkpoint: Path) -> None:
    (checkpoint / "policy" / "weights").write_text("weighty")


def damage_missing(checkpoint: Path) -> None:
    (checkpoint / "policy" / "weights").unlink()


def damage_manifest(checkpoint: Path) -> None:
    (checkpoint / "complete").write_text((checkpoint / "complete").read_text()[:-9])


def damage_old(checkpoint: Path) -> None:
    (checkpoint / "complete").write_text("")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_size, "policy/weights has 5 bytes, expected 7"),
        (damage_content, "policy/weights has another checksum than when it was written"),
        (damage_missing, "policy/weights: No such file or directory"),
        (damage_manifest, "its file 'complete' holds no checksums"),
        (damage_old, "or of an older version of vapo_async"),
    ],
)
def test_a_broken_checkpoint_is_left_out_with_a_line_that_says_why(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    run_dir = tmp_path / "train" / "one"
    first, second = (write_checkpoint(run_dir, step, 2, write) for step in (1, 2))
    damage(second)
    notes: list[str] = []
    assert newest_whole(run_dir, notes.append) == first
    (line,) = notes
    assert line.startswith(f"warning: the checkpoint {second} is broken and left out: ") and words in line
    assert find_resume("auto", tmp_path, "train", pytest.fail) == run_dir, "it has a whole one"
    damage(first)
    with pytest.raises(ConfigError) as caught:
        newest_whole(run_dir, notes.append)
    assert f"step_000002: {fault(second)}; step_000001: {fault(first)}" in str(caught.value)
    assert find_resume("auto", tmp_path, "train", notes.append) is None
    assert notes[-1].startswith(f"warning: {run_dir} has no whole checkpoint and is passed over: step_000002: ")
    older = tmp_path / "train" / "another"
    write_checkpoint(older, 1, 1, write)
    assert find_resume("auto", tmp_path, "train") == older


def test_what_resume_finds(tmp_path: Path) -> None:
    assert find_resume("never", tmp_path, "train") is None
    assert find_resume("auto", tmp_path, "train") is None
    old, new, empty = (tmp_path / "train" / name for name in ("2026-01-01", "2026-01-02", "2026-01-03"))
    for run in (old, new):
        write_checkpoint(run, 1, 1, write)
    empty.mkdir()
    assert find_resume("auto", tmp_path, "train") == new
    assert find_resume(str(old), tmp_path, "train") == old
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        find_resume(str(empty), tmp_path, "train")
    with pytest.raises(ConfigError, match="no such folder"):
        find_resume(str(tmp_path / "nowhere"), tmp_path, "train")


def test_what_a_resume_undid_is_not_kept_in_place_of_what_was_written(tmp_path: Path) -> None:
    for step in (9, 10, 20):
        write_checkpoint(tmp_path, step, 3, write)
    written = write_checkpoint(tmp_path, 15, 2, write)  # resumed from 10, as 20 was broken
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoints" / "step_000010", written]


def test_checkpoints_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        write_checkpoint(tmp_path, step, 2, write)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    for run in ("2026-01-01_00-00-00_2", "2026-01-01_00-00-00_10", "2026-01-01_00-00-00"):
        write_checkpoint(tmp_path / "train" / run, 1, 1, write)
    assert find_resume("auto", tmp_path, "train") == tmp_path / "train" / "2026-01-01_00-00-00_10"
