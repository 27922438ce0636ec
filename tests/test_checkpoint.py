"""Checkpoint folders appear whole or not at all."""

from pathlib import Path

import pytest

from vapo_async.checkpoint import find_resume, list_checkpoints, write_checkpoint
from vapo_async.config import ConfigError


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

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, 2, 1, fail)
    assert list_checkpoints(tmp_path) == [first]
    assert (first / "policy" / "weights").read_text() == "weights"
    write_checkpoint(tmp_path, 2, 1, write)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002"]


def test_a_step_written_again_replaces_itself(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, 2, write)
    write_checkpoint(tmp_path, 3, 2, lambda folder: (folder / "new").touch())
    assert (list_checkpoints(tmp_path)[0] / "new").exists()


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
