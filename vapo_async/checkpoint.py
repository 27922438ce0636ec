"""Checkpoint folders: written beside the others, renamed when whole, the last K kept, verified before they are used."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from vapo_async.config import ConfigError, RunError

CHECKPOINTS = "checkpoints"
POLICY_FOLDER = "policy"
"""In a checkpoint: an ordinary Hugging Face folder."""
COMPLETE = "complete"
"""The manifest of a checkpoint, written last: size and SHA-256 of every other file, as JSON."""
_REPLACED = ".replaced"  # the old one of a step that is written again, until the new one stands in its place


class CheckpointError(RunError):
    """A checkpoint could not be written; the previous ones are intact."""


def write_checkpoint(run_dir: Path, step: int, keep: int, write: Callable[[Path], None]) -> Path:
    """Calls ``write`` on a new folder, then renames it to ``checkpoints/step_<step>`` and drops the oldest.

    ``step`` counts rollout batches, value pretraining included. A crash at any moment leaves the previous one intact.

    Raises:
        CheckpointError: the disk is full or cannot be written to; the partial folder is gone, the previous ones are
            intact.
    """
    root = run_dir / CHECKPOINTS
    final, partial = root / f"step_{step:06d}", root / f".step_{step:06d}.partial"
    replaced = final.with_name(final.name + _REPLACED)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        partial.mkdir()
        write(partial)
        _seal(partial)
        if (final / COMPLETE).exists():  # the same step again, by a resumed run: at every moment one of them counts
            _remove(replaced)
            final.rename(replaced)
        else:
            _remove(final)
        partial.rename(final)
        for folder in (root, run_dir, run_dir.parent):
            _fsync(folder)
    except (OSError, SafetensorError) as error:
        # An error of another process ends with the line that counts.
        reason = (str(error).strip() or type(error).__name__).rpartition("\n")[2]
        kept = list_checkpoints(run_dir)
        last = kept[-1] if kept else "none"
        raise CheckpointError(f"checkpoint not written ({reason}); the last one is {last}") from error
    finally:
        _remove(partial)
    _remove(replaced)
    # Newer ones were undone by a resume from an older one.
    kept = [path for path in list_checkpoints(run_dir) if _order(path) <= _order(final)][-keep:]
    for leftover in {*root.glob("step_*"), *root.glob(".step_*.partial")} - {*kept}:  # those of killed runs too
        _remove(leftover)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that were written to their end, oldest first. Looks at no content."""
    found = (run_dir / CHECKPOINTS).glob("step_[0-9]*")
    return sorted((path for path in found if (path / COMPLETE).exists()), key=_order)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written. Reads all of it."""
    try:
        files = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its file '{COMPLETE}' holds no checksums (damaged, or of an older version of vapo_async)"
    for name, (size, digest) in expected.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, expected {size:,}"
            if _digest(checkpoint / name) != digest:
                return f"{name} has another checksum than when it was written"
        except OSError as error:
            return f"{name}: {error.strerror or error}"
    return None


def newest_whole(run_dir: Path, note: Callable[[str], None]) -> Path:
    """The newest checkpoint of a run that is as it was written; ``note`` is told of each that is skipped, and why.

    Raises:
        ConfigError: there is none; it names all.
    """
    faults: list[str] = []
    for checkpoint in reversed(list_checkpoints(run_dir)):
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint
        note(f"warning: the checkpoint {checkpoint} is broken and left out: {wrong}")
        faults.append(f"{checkpoint.name}: {wrong}")
    raise ConfigError(
        f"no whole checkpoint in {run_dir / CHECKPOINTS} ({'; '.join(faults) or 'there is none'}); "
        "give a run folder that has one, or start a new run"
    )


def checkpoint_of(folder: Path, note: Callable[[str], None]) -> Path | None:
    """The checkpoint that a user means by a folder: a run's newest whole one, or itself; None: it is neither.

    Args:
        folder: a run's folder or a checkpoint.
        note: told of broken checkpoints that are left out.

    Raises:
        ConfigError: the run has no complete checkpoint, or the folder holds several runs.
    """
    if (folder / CHECKPOINTS).is_dir():
        if not list_checkpoints(folder):
            raise ConfigError(f"no complete checkpoint in {folder / CHECKPOINTS}; wait for one or give another run")
        return newest_whole(folder, note)
    if (folder / POLICY_FOLDER).is_dir():
        return folder
    runs = sorted(path.parent for path in folder.glob(f"*/{CHECKPOINTS}"))
    if runs:
        raise ConfigError(f"{folder} holds {len(runs)} run(s): give one of them, the newest is {runs[-1]}")
    return None


def find_resume(resume: str, runs_dir: Path, name: str, note: Callable[[str], None] = lambda _: None) -> Path | None:
    """The run folder to go on with, or None for a new one.

    ``auto`` is the newest run of ``name`` with a whole checkpoint (none: a new run), which reads them; ``note`` is told
    of each run that is passed over. A path must have a checkpoint, which is not read.

    Raises:
        ConfigError: the path is not a run folder or holds no complete checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        for run_dir in sorted((runs_dir / name).glob("*"), key=_natural, reverse=True):
            faults = {checkpoint.name: fault(checkpoint) for checkpoint in reversed(list_checkpoints(run_dir))}
            if None in faults.values():
                return run_dir
            if faults:
                found = "; ".join(f"{name}: {wrong}" for name, wrong in faults.items())
                note(f"warning: {run_dir} has no whole checkpoint and is passed over: {found}")
        return None
    run_dir = Path(resume)
    if not run_dir.is_dir():
        raise ConfigError(f"resume={resume}: no such folder; give a run folder, 'auto' or 'never'")
    if not list_checkpoints(run_dir):
        raise ConfigError(
            f"resume={resume}: no complete checkpoint in {run_dir / CHECKPOINTS}; "
            "give a run folder that has one, 'auto' or 'never'"
        )
    return run_dir


def _order(checkpoint: Path) -> tuple[int, bool]:
    name = checkpoint.name
    return int(name.removesuffix(_REPLACED).removeprefix("step_")), not name.endswith(_REPLACED)


def _natural(path: Path) -> list[str | int]:
    """Sorts …_2 before …_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _seal(folder: Path) -> None:
    """Everything onto the disk, the manifest last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files
    }
    for path in folder.rglob("*"):
        _fsync(path)
    (folder / COMPLETE).write_text(json.dumps({"files": manifest}, indent=1), encoding="utf-8")
    _fsync(folder / COMPLETE)
    _fsync(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first: killed half-way, what is left does not count as complete."""
    with suppress(OSError):  # the next checkpoint tries again
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
