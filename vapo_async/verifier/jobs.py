"""What is asked of a worker and what comes back, and how both travel: length-prefixed JSON, nothing pickled.

A conversation: the parent sends one batch ``{"timeout_s": …, "needs": [...], "jobs": [...]}``; the worker loads
``needs`` with its first batch, sends ``{"ready": true}`` (or ``{"error": "…"}`` and nothing more), then one
``{"correct": …}`` per job, in order, with ``"forbidden": true`` beside it where the answer led to something that a
worker must not do.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_ANSWER_CHARS = 4000
"""Longer answers are wrong without being looked at."""
_HEADER = struct.Struct(">I")


@dataclass(frozen=True)
class EquivalenceJob:
    """Is ``pred`` mathematically the same as ``gold``?"""

    gold: str
    pred: str


@dataclass(frozen=True)
class ReasoningGymJob:
    """Does reasoning-gym's scorer of ``dataset`` pay ``pred`` in full?

    ``answer`` and ``metadata`` (plain JSON data) are those of the generated problem. Scorers that compile the answer's
    text (countdown's, for one) find every answer that they compile forbidden.
    """

    dataset: str
    answer: str
    pred: str
    metadata: dict[str, object] = field(default_factory=dict)


Job = EquivalenceJob | ReasoningGymJob


@dataclass(frozen=True)
class Outcome:
    """The verdict. ``note`` is empty, or why the answer was not judged: "timeout", "crashed", "forbidden" (it led to
    something that a worker must not do) or "too long".
    """

    correct: bool
    note: str = ""


def encode_job(job: Job) -> dict[str, object]:
    """The job as JSON data."""
    match job:
        case EquivalenceJob():
            return {"kind": "equivalence", "gold": job.gold, "pred": job.pred}
        case ReasoningGymJob():
            return {
                "kind": "reasoning_gym",
                "dataset": job.dataset,
                "answer": job.answer,
                "pred": job.pred,
                "metadata": job.metadata,
            }


def needs_of(encoded: dict[str, object]) -> str:
    """Names what a worker must have loaded for this job, as :func:`encode_job` wrote it."""
    return "math_verify" if encoded["kind"] == "equivalence" else f"reasoning_gym {encoded['dataset']}"


def pack(message: dict[str, object]) -> bytes:
    """One frame: four bytes of length, big endian, and JSON in ASCII. ``TypeError`` for what JSON cannot say."""
    body = json.dumps(message, ensure_ascii=True).encode("ascii")
    return _HEADER.pack(len(body)) + body


def unpack(buffer: bytearray, max_bytes: int) -> Iterator[dict[str, object]]:
    """Takes the complete frames off the front of ``buffer``.

    ``ValueError`` for a frame longer than ``max_bytes`` and for what is not a JSON object.
    """
    while len(buffer) >= _HEADER.size:
        (size,) = _HEADER.unpack_from(buffer)
        if size > max_bytes:
            raise ValueError(f"a frame of {size} bytes, at most {max_bytes} are expected")
        end = _HEADER.size + size
        if len(buffer) < end:
            return
        try:
            message = json.loads(buffer[_HEADER.size : end])
        except RecursionError as error:
            raise ValueError("a frame of JSON that is nested too deeply") from error
        if not isinstance(message, dict):
            raise ValueError("a frame that is not a JSON object")
        del buffer[:end]
        yield message
