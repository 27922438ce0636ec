"""The verifier stage. Its names load on first use, so that worker processes import no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vapo_async.verifier.api import is_equivalent
    from vapo_async.verifier.extract import extract_answer
    from vapo_async.verifier.sandbox import Sandbox, SandboxError
    from vapo_async.verifier.scoring import ScoreRequest, TaskVerifier

__all__ = ["Sandbox", "SandboxError", "ScoreRequest", "TaskVerifier", "extract_answer", "is_equivalent"]

_HOMES = {
    "Sandbox": "sandbox",
    "SandboxError": "sandbox",
    "ScoreRequest": "scoring",
    "TaskVerifier": "scoring",
    "extract_answer": "extract",
    "is_equivalent": "api",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{home}"), name)
