"""Log-probabilities and entropies of tokens straight from hidden states, without ever holding [N, V] logits whole."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vapo_async.objectives.checks import describe
from vapo_async.objectives.logprobs_liger import liger_log_probs, liger_takes

TILE_LOGITS = {"cpu": 1 << 22}
"""Logits of a tile, by device type: 16 MiB in float32 stay in a CPU's last cache between the steps of the softmax."""
OTHER_TILE_LOGITS = 1 << 24
"""Of other devices (64 MiB in float32): few, large kernels."""
TILE_COLUMNS = 2048
"""A tile narrower than this would make the matrix products slow."""


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(y_n) = z_n[y_n] − logsumexp(z_n) and H_n = −Σ_v π(v) log π(v), with z = (hidden Wᵀ + bias) / temperature.

    The logits are taken tile by tile, some positions and some of the vocabulary, with a running softmax
    (arXiv 1805.02867); the backward pass computes each tile's logits again. Held are at most two tiles, and in the
    backward pass the gradients. Logits that fit in one tile are kept instead of computed twice. Where ``hidden`` and
    ``weight`` are bfloat16 on a GPU for which Liger has a fused kernel, that kernel does the work.

    Logits have the inputs' dtype, or autocast's; softmax and sums over tiles are float32 (float64 for float64 inputs).
    Under autocast ``hidden`` and ``weight`` may differ in dtype, and each gradient has the dtype of its input.

    Args:
        hidden: [N, H], the last hidden states of the positions that predict the targets.
        weight: [V, H], the output embedding.
        targets: [N] int64 in [0, V).
        temperature: > 0, the one that the tokens were sampled with.
        chunk_tokens: no tile has more logits than this many positions, chunk_tokens·V; None: no more than is fast.
        bias: [V] or None.

    Returns:
        (log_prob [N], entropy [N]), float32 (float64); both differentiable, once, in hidden, weight and bias.

    Raises:
        ValueError: shapes that do not fit, targets outside [0, V), a temperature or chunk that is not positive.
        TypeError: targets that are not int64; without autocast, inputs of different dtypes.
    """
    _check(hidden, weight, bias, targets, temperature, chunk_tokens)
    if liger_takes(hidden, weight, bias):
        return liger_log_probs(hidden, weight, targets, temperature)
    device, n, v = hidden.device.type, len(hidden), len(weight)
    compute = torch.get_autocast_dtype(device) if _autocast(hidden) else hidden.dtype
    limit = TILE_LOGITS.get(device, OTHER_TILE_LOGITS)
    tile = tile_shape(n, v, limit if chunk_tokens is None else min(limit, chunk_tokens * v))
    log_prob, entropy = _TokenLogProbs.apply(hidden, weight, bias, targets, temperature, tile, compute)
    return log_prob, entropy


def tile_shape(n: int, v: int, logits: int) -> tuple[int, int]:
    """(rows, columns) of the tiles that cover [n, v]: at most ``logits`` entries, few rows rather than few columns."""
    columns = max(1, min(v, logits, max(TILE_COLUMNS, logits // max(n, 1))))
    return max(1, min(n, logits // columns)), columns


class _TokenLogProbs(torch.autograd.Function):
    """dz = g_logp (onehot − π) − g_H π (log π + H); dhidden = dz W / T, dW = dzᵀ hidden / T, dbias = Σ dz / T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        tile: tuple[int, int],
        compute: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        n, v = len(hidden), len(weight)
        top = hidden.new_full((n,), 0, dtype=torch.promote_types(compute, torch.float32))
        mass, moment, chosen = torch.zeros_like(top), torch.zeros_like(top), torch.zeros_like(top)
        top.fill_(torch.finfo(top.dtype).min)
        logits, spare = _tile(tile, top), _tile(tile, top)
        one_tile = tile == (n, v) and any(ctx.needs_input_grad)
        kept = None
        h = hidden.to(compute)
        for columns in _parts(v, tile[1]):
            w, b = _columns(weight, bias, columns, compute)
            for rows in _parts(n, tile[0]):
                z = _logits(h[rows], w, b, temperature, logits)
                index, inside = _within(targets[rows], columns)
                chosen[rows] = torch.where(inside, z.gather(1, index)[:, 0], chosen[rows])
                _absorb(z, _view(spare, z.shape), top[rows], mass[rows], moment[rows])
                kept = z.sub_(mass.log()[:, None]) if one_tile else None
        log_mass = mass.log()
        log_prob, entropy = chosen - top - log_mass, log_mass - moment / mass
        ctx.save_for_backward(hidden, weight, bias, targets, top + log_mass, entropy, kept)
        ctx.temperature, ctx.tile, ctx.compute = temperature, tile, compute
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy, kept = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        # dz = g onehot − π (level + slope log π); the slope is the entropy's, and usually there is none.
        g, slope = (None if grad is None else grad.to(lse.dtype) / ctx.temperature for grad in grads)
        g = torch.zeros_like(lse) if g is None else g
        slope = None if slope is None or not slope.any() else slope
        level = g if slope is None else g + slope * entropy
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if need_bias else None
        logits, spare = _tile(ctx.tile, lse), None if slope is None else _tile(ctx.tile, lse)
        h = hidden.to(ctx.compute)
        for columns in _parts(len(weight), ctx.tile[1]):
            w, b = _columns(weight, bias, columns, ctx.compute)
            # The sum over rows: in place, or in a float32 copy where the weight has fewer bits.
            grad_w = None if grad_weight is None else grad_weight[columns].to(lse.dtype)
            for rows in _parts(len(h), ctx.tile[0]):
                if kept is None:
                    log_p = _logits(h[rows], w, b, ctx.temperature, logits).sub_(lse[rows, None])
                else:
                    log_p = _view(logits, kept.shape).copy_(kept)
                if slope is None or spare is None:
                    dz = log_p.exp_().mul_(-level[rows, None])
                else:
                    dz = torch.exp(log_p, out=_view(spare, log_p.shape))
                    dz.mul_(log_p.mul_(-slope[rows, None]).sub_(level[rows, None]))
                index, inside = _within(targets[rows], columns)
                dz.scatter_add_(1, index, (g[rows] * inside)[:, None])
                if grad_bias is not None:
                    grad_bias[columns] += dz.sum(0)
                dz = dz.to(ctx.compute)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], dz, w)
                if grad_w is not None:
                    _add_product(grad_w, dz.T, h[rows])
            if grad_weight is not None and grad_w is not None and grad_w.dtype != grad_weight.dtype:
                grad_weight[columns] = grad_w
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _absorb(z: Tensor, spare: Tensor, top: Tensor, mass: Tensor, moment: Tensor) -> None:
    """Takes a tile's columns into the rows' running softmax, in place; leaves z − top in ``z``.

    ``top`` is the largest logit so far, ``mass`` Σ e^(z − top), ``moment`` Σ e^(z − top) (z − top). The entropy is
    log mass − moment / mass: both terms are of its own size, however large the logits are.
    """
    shift = top.clone()
    torch.maximum(shift, z.amax(1), out=top)
    shift -= top
    z.sub_(top[:, None])
    e = torch.exp(z, out=spare)
    decay = shift.exp()
    moment.addcmul_(shift, mass).mul_(decay)
    mass.mul_(decay).add_(e.sum(1))
    moment.add_(e.mul_(z).sum(1))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, buffer: Tensor) -> Tensor:
    """z of a tile in ``buffer``; rounded to the inputs' dtype before the temperature, as an engine does it."""
    out = _view(buffer, torch.Size((len(hidden), len(weight))))
    if hidden.dtype != out.dtype:
        return out.copy_(torch.nn.functional.linear(hidden, weight, bias)).div_(temperature)
    scale = 1 / temperature
    if bias is None:
        return torch.addmm(out, hidden, weight.T, beta=0, alpha=scale, out=out)  # beta = 0: what is in it is not read
    return torch.addmm(bias, hidden, weight.T, beta=scale, alpha=scale, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Each row's target as a column of the tile, [rows, 1], and whether it is one, [rows]."""
    index = targets - columns.start
    inside = (index >= 0) & (index < columns.stop - columns.start)
    return index.where(inside, 0)[:, None], inside


def _columns(weight: Tensor, bias: Tensor | None, columns: slice, compute: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight[columns].to(compute), None if bias is None else bias[columns].to(compute)


def _tile(shape: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_empty(shape[0] * shape[1])


def _view(buffer: Tensor, shape: torch.Size) -> Tensor:
    return buffer[: shape.numel()].view(shape)


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _autocast(hidden: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64  # which autocast leaves


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int | None,
) -> None:
    shapes = describe(hidden=hidden, weight=weight, targets=targets)
    fits = hidden.ndim == weight.ndim == 2 and targets.ndim == 1
    if not fits or hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"expected hidden [N, H], weight [V, H], targets [N], got {shapes}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected bias [V], got {describe(bias=bias, weight=weight)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}: convert them with .long()")
    dtypes = {name: t.dtype for name, t in (("hidden", hidden), ("weight", weight), ("bias", bias)) if t is not None}
    if len(set(dtypes.values())) > 1 and not _autocast(hidden):
        found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"expected one dtype without autocast, got {found}: convert them, or enable autocast")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    low, high = (int(targets.min()), int(targets.max())) if len(targets) else (0, -1)
    if low < 0 or high >= len(weight):  # such a target is in no tile: there would be a number and no error
        raise ValueError(f"targets must lie in [0, {len(weight)}), the vocabulary of weight, got {low} to {high}")
