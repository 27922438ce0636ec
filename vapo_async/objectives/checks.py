"""Shape checks on entry: an error names every argument with its shape."""

import torch
from torch import Tensor


def check_same_shape(ndim: int | None = None, **tensors: Tensor) -> None:
    """Raises ``ValueError`` unless all tensors have one shape (of ``ndim`` dimensions, if given)."""
    shapes = {tuple(t.shape) for t in tensors.values()}
    if len(shapes) > 1:
        raise ValueError(f"expected equal shapes, got {describe(**tensors)}")
    if ndim is not None and len(next(iter(shapes))) != ndim:
        raise ValueError(f"expected {ndim} dimensions, got {describe(**tensors)}")


def check_rows(rows: int, **tensors: Tensor) -> None:
    """Raises ``ValueError`` unless every tensor has shape [rows]."""
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != (rows,):
            raise ValueError(f"expected {name} of shape [{rows}], one entry per row, got {describe(**{name: tensor})}")


def check_mask(mask: Tensor) -> None:
    """Raises ``TypeError`` unless ``mask`` is boolean."""
    if mask.dtype is not torch.bool:
        raise TypeError(f"expected a boolean mask, got dtype {mask.dtype}")


def describe(**tensors: Tensor) -> str:
    """``value [2, 3], mask [2, 4]``."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
