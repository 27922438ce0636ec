"""Folders that are built once: named by a hash of their recipe, complete or absent, never built twice at a time."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from vapo_async.config import ConfigError

CACHE_VARIABLE = "VAPO_ASYNC_CACHE"


def cache_root(cache_dir: str | None) -> Path:
    """The configured folder, else ``$VAPO_ASYNC_CACHE``, else the user's cache folder; created if need be."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or user_cache_dir("vapo_async")
    root = Path(chosen).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(
            f"cache folder {root} cannot be written ({error.strerror}); set model.cache_dir or ${CACHE_VARIABLE}"
        ) from error
    return root


def recipe_hash(recipe: Mapping[str, object]) -> str:
    """Twelve hexadecimal digits that change whenever the recipe does."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def ensure_folder(folder: Path, build: Callable[[Path], None], waiting: Callable[[], None]) -> Path:
    """``folder`` if it is there; else what ``build`` writes into an empty folder beside it, renamed when complete.

    A second process waits for the first (``waiting`` is called once) and takes its result. A build that dies leaves
    only a ``.building-*`` folder, which the next one removes.
    """
    if folder.is_dir():
        return folder
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    if not _acquired_at_once(lock):
        waiting()
        lock.acquire()
    try:
        if folder.is_dir():
            return folder
        for dead in folder.parent.glob(f".building-{folder.name}-*"):
            shutil.rmtree(dead)
        unfinished = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
        try:
            build(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        lock.release()
    return folder


def _acquired_at_once(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return False
    return True
