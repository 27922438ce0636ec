"""Checks and conversions on entry: an error names every argument with what was found; none waits for a device."""

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


def check_boolean(**tensors: Tensor) -> None:
    """Raises ``TypeError`` unless every tensor is boolean."""
    for name, tensor in tensors.items():
        if tensor.dtype is not torch.bool:
            raise TypeError(f"expected {name} to be boolean, got dtype {tensor.dtype}")


def check_scalars(**coefficients: Tensor | float | None) -> None:
    """Raises ``ValueError`` unless every coefficient that is a tensor has no dimensions."""
    for name, coefficient in coefficients.items():
        if isinstance(coefficient, Tensor) and coefficient.ndim:
            raise ValueError(f"expected {name} to be a number or a tensor of shape [], got {list(coefficient.shape)}")


def check_above(bound: float, **coefficients: Tensor | float | None) -> None:
    """Raises ``ValueError`` unless every coefficient that is a number is above ``bound``; NaN is not."""
    for name, coefficient in coefficients.items():
        if isinstance(coefficient, int | float) and not coefficient > bound:
            expected = "positive" if bound == 0 else f"above {bound:g}"
            raise ValueError(f"{name} must be {expected}, got {coefficient}")


def check_clip(clip_low: Tensor | float, clip_high: Tensor | float) -> None:
    """Raises ``ValueError`` unless 0 ≤ ε_low < 1 and 0 ≤ ε_high, of those that are numbers."""
    low_fits = isinstance(clip_low, Tensor) or 0 <= clip_low < 1
    high_fits = isinstance(clip_high, Tensor) or clip_high >= 0
    if not low_fits or not high_fits:
        raise ValueError(f"expected 0 <= clip_low < 1 and clip_high >= 0, got {clip_low} and {clip_high}")


def check_range(low: float, high: float) -> None:
    """Raises ``ValueError`` unless 0 ≤ low < high, the ends of a range of ratios."""
    if not 0 <= low < high:
        raise ValueError(f"expected 0 <= mismatch_low < mismatch_high, got {low} and {high}")


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` with bfloat16, float16 and integers as float32: exponentials of log-prob differences need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def describe(**tensors: Tensor) -> str:
    """``value [2, 3], mask [2, 4]``."""
    return ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
