"""Plain torch, one process: a module with its optimizer and schedule."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vapo_async.config import RunError
from vapo_async.learner.tensors import check_tensors

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for a parameter."""


class LearnerDivergedError(RunError):
    """A loss or a gradient is not finite; the message names it and what to do."""


class TorchBackend:
    """Steps one module with AdamW; learning rate constant after a linear warm-up.

    ``step_count`` counts optimizer steps.
    """

    def __init__(
        self, module: nn.Module, *, lr: float, warmup_steps: int, weight_decay: float, max_grad_norm: float
    ) -> None:
        self.module = module
        self._params = dict(module.named_parameters())  # tied parameters once
        self._max_grad_norm = max_grad_norm
        self._optimizer = torch.optim.AdamW(self._params.values(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
        self._lr, self._warmup_steps = lr, warmup_steps
        self.step_count = 0

    def step(self) -> float:
        """Clips, steps, clears the gradients; returns the gradient norm before clipping.

        Raises:
            LearnerDivergedError: the norm is not finite; the weights are left as they were.
        """
        warmup = min(1.0, (self.step_count + 1) / self._warmup_steps) if self._warmup_steps else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * warmup
        norm = torch.nn.utils.clip_grad_norm_(list(self._params.values()), self._max_grad_norm)
        if not torch.isfinite(norm):
            raise LearnerDivergedError(
                f"the gradient norm of {type(self.module).__name__} is {float(norm)} "
                f"at optimizer step {self.step_count}: "
                "lower algorithm.policy_lr / algorithm.critic_lr, or look at the last rows of metrics.jsonl"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return float(norm)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts by parameter name: ``<name>/exp_avg`` and so on."""
        return {
            f"{name}/{key}": value.detach()
            for name, p in self._params.items()
            for key, value in self._optimizer.state.get(p, {}).items()
        }

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """The reverse of :meth:`optimizer_tensors`; moments go to their parameter's device.

        Raises:
            ConfigError: names or shapes are not those of this module's parameters.
        """
        stepped = {key.rpartition("/")[0] for key in tensors}  # a parameter that never had a gradient has no state
        expected = {
            f"{name}/{key}": torch.Size() if key == "step" else p.shape
            for name, p in self._params.items()
            if name in stepped
            for key in MOMENTS
        }
        check_tensors(f"optimizer of {type(self.module).__name__}", tensors, expected)
        state = {
            i: {key: tensors[f"{name}/{key}"].clone() for key in MOMENTS}
            for i, name in enumerate(self._params)
            if name in stepped
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})  # torch moves them
        self.step_count = step_count
