"""Compares saved tensors with what they are loaded into."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from vapo_async.config import ConfigError


def check_tensors(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], optional: Collection[str] = ()
) -> None:
    """Names and shapes of ``found`` are those of ``expected``; names in ``optional`` may be missing.

    Raises:
        ConfigError: names the first tensor that differs, in the order of ``expected``.
    """
    for name in (*expected, *found):
        here = found[name].shape if name in found else None
        there = expected.get(name)
        if here != there and not (here is None and name in optional):
            raise ConfigError(
                f"the checkpoint's {what} does not fit: {name} is {_shape(here)}, expected {_shape(there)}: "
                "resume with the run's own model"
            )


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
