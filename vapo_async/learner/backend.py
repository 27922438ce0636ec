"""What steps a model, whoever does it: the line between VAPO's step and how many processes share it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vapo_async.config import RunError

ALL_PARTS = 3
"""The stage of ZeRO that shares out parameters too."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for a parameter."""
BETAS = (0.9, 0.95)
"""AdamW's."""
Snapshot = list[Tensor]
"""This process's part of a model's parameters at one time."""


class LearnerDivergedError(RunError):
    """A loss or a gradient is not finite; the message names it and what to do."""

    @classmethod
    def at(cls, module: nn.Module, norm: float, step: int) -> "LearnerDivergedError":
        """For the gradient norm of an optimizer step."""
        return cls(
            f"the gradient norm of {type(module).__name__} is {norm} at optimizer step {step}: "
            "lower algorithm.policy_lr / algorithm.critic_lr, or look at the last rows of metrics.jsonl"
        )


@dataclass(frozen=True)
class Schedule:
    """How one module is stepped: AdamW, its learning rate constant after a linear warm-up."""

    lr: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float

    def lr_at(self, step: int) -> float:
        """Of the optimizer step that follows ``step`` others."""
        return self.lr * (min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0)


class Backend(Protocol):
    """One model with its optimizer. All ranks make the same calls in the same order.

    ``step_count`` counts optimizer steps.
    """

    step_count: int

    @property
    def module(self) -> nn.Module:
        """The model; its parameters may be in parts. Calling it is for passes without a gradient."""
        ...

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the whole parameters, by name, tied ones once."""
        ...

    def forward(self, tokens: Tensor, mask: Tensor, lengths: Sequence[int] | None = None) -> Any:
        """The model's output, to be used for :meth:`backward`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's share of the loss; the shares of all processes add up."""
        ...

    def step(self) -> float:
        """Clips, steps, clears the gradients; returns the gradient norm before clipping.

        Raises:
            LearnerDivergedError: the norm is not finite.
        """
        ...

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters by name, tied ones once; each is of use until the next one is asked for."""
        ...

    def load_parameters(self, tensors: Callable[[str], Tensor]) -> None:
        """The reverse: ``tensors`` gives a whole parameter by name."""
        ...

    def masters(self) -> Iterator[tuple[str, Tensor]] | None:
        """As :meth:`parameters`, in float32, of what is stepped; None where that is the model's own parameters.

        :meth:`load_parameters` takes them as well.
        """
        ...

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """AdamW's moments and step counts, whole, by parameter name: ``<name>/exp_avg`` and so on."""
        ...

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """The reverse.

        Raises:
            ConfigError: names or shapes are not those of this module's parameters.
        """
        ...

    def snapshot(self) -> Snapshot:
        """A copy of this process's part of the parameters."""
        ...

    def using(self, snapshot: Snapshot) -> AbstractContextManager[None]:
        """Inside, the model has the parameters of a snapshot; no gradient is taken."""
        ...
