"""The recursions of :mod:`vapo_async.objectives.advantage`, step by step in float64, compiled by Numba for the CPU.

One pass from the end of each row to its start: every input is read once, every result written once. Only steps under
the mask are read; the others pass on what comes from behind them, unless a trajectory ends there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor


def advantages_on_cpu(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    lmbda: Tensor,
    next_value: Tensor | None,
    ends: Tensor | None,
    gamma: float,
    log_ratio: Tensor | None = None,
    rho_cap: float = 1.0,
    c_cap: float = 1.0,
) -> Tensor:
    """Â_t = ρ_t δ_t + γ λ_t c_t Â_{t+1}, with ρ = c = 1 where ``log_ratio`` is None.

    All [B, T] on the CPU and without gradient, but ``lmbda`` [B, 1] or [B, T]. Returns [B, T] of ``value``'s dtype.
    """
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    caps = float(rho_cap), float(c_cap)
    _advantages(*_arrays(value, reward, mask, lmbda, next_value, ends, log_ratio, result), float(gamma), *caps)
    return result


def returns_on_cpu(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    lmbda: Tensor,
    next_value: Tensor | None,
    ends: Tensor | None,
    gamma: float,
) -> Tensor:
    """G_t = r_t + γ (V(s_{t+1}) + λ_t (G_{t+1} − V_{t+1})); arguments and result as :func:`advantages_on_cpu`."""
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    _returns(*_arrays(value, reward, mask, lmbda, next_value, ends, result), float(gamma))
    return result


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call for a set of argument types (0.3 s), and kept on disk where there is a place to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return njit(nogil=True)(function)


def _arrays(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else t.detach().contiguous().numpy() for t in tensors)


@_compiled
def _advantages(value, reward, mask, lmbda, next_value, ends, log_ratio, result, gamma, rho_cap, c_cap):  # type: ignore[no-untyped-def]
    rows, steps = value.shape
    for b in range(rows):
        following, carried = 0.0, 0.0  # V and Â of the trajectory's next action
        for t in range(steps - 1, -1, -1):
            if ends is not None and ends[b, t]:
                following, carried = 0.0, 0.0
            if not mask[b, t]:
                result[b, t] = 0.0
                continue
            v, factor = float(value[b, t]), gamma * lmbda[b, t if lmbda.shape[1] > 1 else 0]
            bootstrap = following if next_value is None else float(next_value[b, t])
            delta = float(reward[b, t]) + gamma * bootstrap - v
            if log_ratio is not None:
                ratio = np.exp(float(log_ratio[b, t]))
                delta *= np.minimum(rho_cap, ratio)  # NaN stays NaN
                factor *= np.minimum(c_cap, ratio)
            carried = delta + factor * carried
            following = v
            result[b, t] = carried


@_compiled
def _returns(value, reward, mask, lmbda, next_value, ends, result, gamma):  # type: ignore[no-untyped-def]
    rows, steps = value.shape
    for b in range(rows):
        following, carried = 0.0, 0.0  # V and G of the trajectory's next action
        for t in range(steps - 1, -1, -1):
            if ends is not None and ends[b, t]:
                following, carried = 0.0, 0.0
            if not mask[b, t]:
                result[b, t] = 0.0
                continue
            lam = lmbda[b, t if lmbda.shape[1] > 1 else 0]
            bootstrap = following if next_value is None else float(next_value[b, t])
            # In this order, so that gamma = lambda = 1 leaves no trace of V: bootstrap - following is exactly 0 then.
            carried = float(reward[b, t]) + gamma * (bootstrap - lam * following) + gamma * lam * carried
            following = float(value[b, t])
            result[b, t] = carried
