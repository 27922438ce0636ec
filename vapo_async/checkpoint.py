"""Checkpoint folders: written beside the others and renamed when whole, the last K kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from vapo_async.config import ConfigError

CHECKPOINTS = "checkpoints"
COMPLETE = "complete"  # a file in a checkpoint that was written to its end


def write_checkpoint(run_dir: Path, step: int, keep: int, write: Callable[[Path], None]) -> Path:
    """Calls ``write`` on a new folder, then renames it to ``checkpoints/step_<step>`` and drops the oldest.

    ``step`` counts rollout batches, value pretraining included. A crash at any moment leaves the previous one intact.
    """
    root = run_dir / CHECKPOINTS
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / f"step_{step:06d}", root / f".step_{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    (partial / COMPLETE).touch()
    for path in [*partial.rglob("*"), partial]:
        _fsync(path)
    if final.exists():  # the same step again, by a resumed run
        shutil.rmtree(final)
    partial.rename(final)
    _fsync(root)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / CHECKPOINTS).glob("step_*")
    return sorted(path for path in found if (path / COMPLETE).exists())


def find_resume(resume: str, runs_dir: Path, name: str) -> Path | None:
    """The run folder to go on with, or None for a new one.

    ``auto`` is the newest run of ``name`` with a checkpoint (none: a new run); a path must have one.

    Raises:
        ConfigError: the path is not a run folder or holds no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        runs = sorted(path for path in (runs_dir / name).glob("*") if list_checkpoints(path))
        return runs[-1] if runs else None
    run_dir = Path(resume)
    if not run_dir.is_dir():
        raise ConfigError(f"resume={resume}: no such folder; give a run folder, 'auto' or 'never'")
    if not list_checkpoints(run_dir):
        raise ConfigError(
            f"resume={resume}: no complete checkpoint in {run_dir / CHECKPOINTS}; "
            "give a run folder that has one, 'auto' or 'never'"
        )
    return run_dir


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
