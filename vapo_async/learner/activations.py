"""Activation checkpointing (arXiv 1604.06174): a decoder layer keeps its input and computes the rest again."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vapo_async.config import ConfigError


def checkpoint_activations(model: nn.Module) -> None:
    """Has every decoder layer of a Transformers model recompute its activations in backward passes.

    Transformers does it in training mode only. The learner's models stay in evaluation mode, so only the layers
    themselves are told that they train; what is inside them, dropout for example, is not.

    Raises:
        ConfigError: the model has no layers that can do it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"learner.activation_checkpointing=true: {type(model).__name__} has no layers that can compute their "
            "activations again; set it to false"
        )
    again = partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer.gradient_checkpointing = True
        vars(layer)["_gradient_checkpointing_func"] = again
        layer.training = True
