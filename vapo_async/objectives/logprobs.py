"""Log-probabilities and entropies of tokens straight from hidden states, without ever holding [N, V] logits whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vapo_async.objectives.checks import describe

WHOLE_LOGITS = 1 << 22
"""Logits of up to this many entries (16 MiB in float32) are taken in one piece, whatever the chunk size."""


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int,
    bias: Tensor | None = None,
    whole_logits: int = WHOLE_LOGITS,
) -> tuple[Tensor, Tensor]:
    """log π(y_n) = z_n[y_n] − logsumexp(z_n) and H_n = −Σ_v π(v) log π(v), with z = (hidden Wᵀ + bias) / temperature.

    Chunks of positions are taken one after the other; the backward pass computes each chunk's logits again. Logits have
    the inputs' dtype, the softmax is float32 (float64 for float64 inputs).

    Args:
        hidden: [N, H], the last hidden states of the positions that predict the targets.
        weight: [V, H], the output embedding.
        targets: [N] int64 in [0, V).
        temperature: > 0, the one that the tokens were sampled with.
        chunk_tokens: positions whose [V] logits are held at once.
        bias: [V] or None.
        whole_logits: below this many logits, N·V, there is a single chunk.

    Returns:
        (log_prob [N], entropy [N]), float32 (float64); both differentiable, once, in hidden, weight and bias.
    """
    shapes = describe(hidden=hidden, weight=weight, targets=targets)
    if hidden.ndim != 2 or weight.ndim != 2 or targets.ndim != 1:
        raise ValueError(f"expected hidden [N, H], weight [V, H], targets [N], got {shapes}")
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(f"expected hidden [N, H], weight [V, H], targets [N], got {shapes}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected bias [V], got {describe(bias=bias, weight=weight)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    n, v = hidden.shape[0], weight.shape[0]
    chunk = n if n * v <= whole_logits else chunk_tokens
    log_prob, entropy = _TokenLogProbs.apply(hidden, weight, bias, targets, temperature, max(chunk, 1))
    return log_prob, entropy


class _TokenLogProbs(torch.autograd.Function):
    """dz = g_logp (onehot − π) − g_H π (log π + H); dhidden = dz W / T, dW = dzᵀ hidden / T, dbias = Σ dz / T."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_prob = torch.empty(len(targets), dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(log_prob)
        kept = None
        for part in _parts(len(targets), chunk):
            log_p = _log_softmax(hidden[part], weight, bias, temperature)
            log_prob[part] = log_p.gather(1, targets[part, None])[:, 0]
            entropy[part] = -(log_p.exp() * log_p).sum(1)
            if len(targets) <= chunk and any(ctx.needs_input_grad):
                kept = log_p  # a single chunk need not be computed twice
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, kept)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_prob, grad_entropy = grads
        hidden, weight, bias, targets, entropy, kept = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=entropy.dtype) if need_bias else None
        for part in _parts(len(targets), ctx.chunk):
            log_p = _log_softmax(hidden[part], weight, bias, ctx.temperature) if kept is None else kept
            g_log_prob, g_entropy, h = grad_log_prob[part, None], grad_entropy[part, None], entropy[part, None]
            dz = log_p.exp() * -(g_log_prob + g_entropy * (log_p + h))
            dz.scatter_add_(1, targets[part, None], g_log_prob)
            dz /= ctx.temperature
            if grad_bias is not None:
                grad_bias += dz.sum(0)
            dz = dz.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dz @ weight
            if grad_weight is not None:
                grad_weight += dz.T @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _parts(n: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, n, chunk))


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits.log_softmax(-1)
