"""Checkpoint folders: written beside the others and renamed when whole, the last K kept."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from vapo_async.config import ConfigError, RunError

CHECKPOINTS = "checkpoints"
COMPLETE = "complete"  # a file in a checkpoint that was written to its end


def write_checkpoint(run_dir: Path, step: int, keep: int, write: Callable[[Path], None]) -> Path:
    """Calls ``write`` on a new folder, then renames it to ``checkpoints/step_<step>`` and drops the oldest.

    ``step`` counts rollout batches, value pretraining included. A crash at any moment leaves the previous one intact.

    Raises:
        RunError: the disk is full or cannot be written to; the partial folder is gone and the previous ones are intact.
    """
    root = run_dir / CHECKPOINTS
    final, partial = root / f"step_{step:06d}", root / f".step_{step:06d}.partial"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        write(partial)
        (partial / COMPLETE).touch()
        for path in [*partial.rglob("*"), partial]:
            _fsync(path)
        _remove(final)  # the same step again, by a resumed run
        partial.rename(final)
        _fsync(root)
    except (OSError, SafetensorError) as error:
        # An error of another process ends with the line that counts.
        reason = (str(error).strip() or type(error).__name__).rpartition("\n")[2]
        kept = list_checkpoints(run_dir)
        last = kept[-1] if kept else "none"
        raise RunError(f"checkpoint not written ({reason}); the last one is {last}") from error
    finally:
        _remove(partial)
    kept = list_checkpoints(run_dir)[-keep:]
    for leftover in {*root.glob("step_*"), *root.glob(".step_*.partial")} - {*kept}:  # those of killed runs too
        _remove(leftover)
    return final


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, its mark first: killed half-way, what is left does not count as complete."""
    with suppress(OSError):  # the next checkpoint tries again
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)


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
