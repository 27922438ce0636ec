"""Plain torch, one process: a module with its optimizer and schedule."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vapo_async.learner.backend import BETAS, MOMENTS, LearnerDivergedError, Schedule, Snapshot
from vapo_async.learner.tensors import check_tensors


class TorchBackend:
    """See :class:`vapo_async.learner.backend.Backend`.

    Args:
        module: the model; what it is called with and returns is the caller's.
        schedule: of the steps.
        prefix: left out of the parameters' names, all of which start with it.
    """

    def __init__(self, module: nn.Module, schedule: Schedule, prefix: str = "") -> None:
        self.module = module
        self._schedule = schedule
        self._params = {name.removeprefix(prefix): p for name, p in module.named_parameters()}  # tied ones once
        self.shapes = {name: p.shape for name, p in self._params.items()}
        self._optimizer = torch.optim.AdamW(
            self._params.values(), lr=schedule.lr, betas=BETAS, weight_decay=schedule.weight_decay
        )
        self.step_count = 0

    def forward(self, tokens: Tensor, mask: Tensor, lengths: Sequence[int] | None = None) -> Any:
        return self.module(tokens, mask, lengths)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.lr_at(self.step_count)
        norm = torch.nn.utils.clip_grad_norm_(list(self._params.values()), self._schedule.max_grad_norm)
        if not torch.isfinite(norm):  # the weights are left as they were
            raise LearnerDivergedError.at(self.module, float(norm), self.step_count)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        return float(norm)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self._params.items())

    def masters(self) -> None:
        return None

    @torch.no_grad()
    def load_parameters(self, tensors: Callable[[str], Tensor]) -> None:
        for name, p in self._params.items():
            p.copy_(tensors(name))

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self._params.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                yield f"{name}/{key}", value.detach()

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """Moments go to their parameter's device."""
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

    def snapshot(self) -> Snapshot:
        return [p.detach().clone() for p in self._params.values()]

    @contextmanager
    def using(self, snapshot: Snapshot) -> Iterator[None]:
        present = [p.data for p in self._params.values()]
        try:
            for p, older in zip(self._params.values(), snapshot, strict=True):
                p.data = older
            yield
        finally:
            for p, own in zip(self._params.values(), present, strict=True):
                p.data = own
