"""Liger's fused scaled cross-entropy as a source of per-token log-probs and entropies."""

import functools
import importlib

import torch
from torch import Tensor

HOPPER = (9, 0)


def liger_takes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether Liger has a fused kernel for these inputs: bfloat16, no bias, on a Hopper GPU.

    Elsewhere Liger's function is a loop of plain torch operations over 512 tokens, of which ours is the leaner one.
    """
    return (
        hidden.is_cuda
        and hidden.dtype == weight.dtype == torch.bfloat16
        and bias is None
        and hidden.numel() > 0
        and torch.cuda.get_device_capability(hidden.device) == HOPPER
        and _kernel_is_there()
    )


def liger_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log_prob [N], entropy [N]) in float32, like :func:`~vapo_async.objectives.logprobs.token_log_probs`.

    Liger rounds the entropy to bfloat16, and its kernel sums the weight's gradient in bfloat16 over waves of 1,024
    tokens.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, targets, float(temperature), ignore_index=-100, return_entropy=True
    )
    return -nll, entropy.float()


@functools.cache
def _kernel_is_there() -> bool:
    try:
        importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    except ImportError:  # Liger, or NVIDIA's CuTe DSL that this kernel is written in
        return False
    return True
