"""What a part of a run keeps for an exact resume, and its two files: plain JSON data and tensors.

Nothing is pickled: a checkpoint may come from anyone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class State:
    """``data`` is JSON-able; ``tensors`` may have any dtype and shape, on any device."""

    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def nested(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix/``, for a state that holds this one."""
        return {f"{prefix}/{key}": value for key, value in self.tensors.items()}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The reverse of :meth:`State.nested`."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def write_state(state: State, folder: Path, name: str) -> None:
    """``name.json`` and ``name.safetensors`` in an existing folder.

    Raises:
        OSError, SafetensorError: the disk is full.
    """
    (folder / f"{name}.json").write_text(json.dumps(state.data, indent=1))
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.tensors.items()}
    save_file(tensors, folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> State:
    """What :func:`write_state` wrote, tensors on the CPU."""
    data = json.loads((folder / f"{name}.json").read_text())
    return State(data, load_file(folder / f"{name}.safetensors"))
