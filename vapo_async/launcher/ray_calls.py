"""What an answer of an actor says: its value, or an error that names who was waited for."""

import re
from concurrent.futures import Future
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from safetensors import SafetensorError

from vapo_async.buffer import PublicationError
from vapo_async.config import ConfigError, RunError
from vapo_async.stages import StageDiedError

_OURS = re.compile(r"^vapo_async\.[\w.]+: ")
_TOLD = (ConfigError, RunError, OSError, SafetensorError, PublicationError)


def answer(future: Future[Any], whom: str, logs: str) -> Any:
    """The value of a future that is done.

    Args:
        future: of the answer.
        whom: the stage that was asked.
        logs: where a dead process may have left its reason.

    Raises:
        StageDiedError: the process of ``whom`` is dead, or that of a stage that it waited for, or whose data it needed.
        ConfigError, RunError, OSError, SafetensorError, PublicationError: as the actor raised it.
        RayTaskError: anything else that it raised, also an instance of what that was.
    """
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, RayActorError):
        raise died(whom, error, logs) from error
    if isinstance(error, ObjectLostError):
        raise _lost(whom, logs) from error
    if isinstance(error, RayTaskError):
        if isinstance(error.cause, _TOLD):  # as it was raised: one line, without Ray's trace
            raise error.cause from error
        if isinstance(error.cause, RayActorError):
            raise died(f"{whom}, which waited for a stage", error.cause, logs) from error
        if isinstance(error.cause, ObjectLostError):
            raise _lost(whom, logs) from error
    raise error


def died(whom: str, error: RayActorError, logs: str) -> StageDiedError:
    """The process of ``whom`` is dead."""
    lines = str(error).strip().splitlines()
    if error.actor_init_failed:
        return StageDiedError(f"{whom} failed: {_last_words(error)}")
    return StageDiedError(f"the run waited for {whom}, whose process died ({lines[0]}); see {logs}")


def _lost(whom: str, logs: str) -> StageDiedError:
    """Data went with the process, or the node, that had it."""
    return StageDiedError(f"{whom} could not get its data, as the process or the node that had it died; see {logs}")


def _last_words(error: RayActorError) -> str:
    """Of a process that raised while it started: the last line, without the class of an error that is ours."""
    return _OURS.sub("", str(error).strip().rpartition("\n")[2].strip())


def reason(error: BaseException) -> str:
    """One line for a note: how a process ended."""
    if isinstance(error, RayActorError):
        if error.actor_init_failed:
            return f"it failed: {_last_words(error)}"
        return "its process died"
    if isinstance(error, RayTaskError):
        lines = str(error.cause).strip().splitlines()
        if isinstance(error.cause, RunError):  # written to be read
            return lines[0]
        return f"it raised {type(error.cause).__name__}" + (f": {lines[0]}" if lines else "")
    return str(error)
