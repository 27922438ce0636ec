"""DeepSpeed over all ranks of ``torch.distributed``: ZeRO-1, 2 and 3 (arXiv 1910.02054)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from vapo_async.config import DeepSpeedLearnerConfig
from vapo_async.learner.backend import ALL_PARTS, BETAS, MOMENTS, LearnerDivergedError, Schedule, Snapshot
from vapo_async.learner.ranks import Ranks
from vapo_async.learner.tensors import check_tensors


class DeepSpeedBackend:
    """See :class:`vapo_async.learner.backend.Backend`.

    Args:
        module: the model; what it is called with and returns is the caller's.
        schedule: of the steps.
        config: the stage, and what is kept in the host's memory.
        ranks: this process's place among all.
        prefix: left out of the parameters' names, all of which start with it.
    """

    def __init__(
        self, module: nn.Module, schedule: Schedule, config: DeepSpeedLearnerConfig, ranks: Ranks, prefix: str = ""
    ) -> None:
        self.module, self._schedule, self._ranks = module, schedule, ranks
        self._params = {name.removeprefix(prefix): p for name, p in module.named_parameters()}  # tied ones once
        self.shapes = {name: whole_shape(p) for name, p in self._params.items()}
        optimizer = torch.optim.AdamW(
            self._params.values(), lr=schedule.lr, betas=BETAS, weight_decay=schedule.weight_decay
        )
        dtype = next(module.parameters()).dtype
        with redirect_stdout(StringIO()):  # the optimizer of stage 1 and bfloat16 prints what memory it finds
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings_of(config, schedule, dtype)
            )
        self._parts = config.zero_stage == ALL_PARTS
        self.step_count = 0

    def forward(self, tokens: Tensor, mask: Tensor, lengths: Sequence[int] | None = None) -> Any:
        return self._engine(tokens, mask, lengths)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._ranks.size)  # DeepSpeed takes the mean over ranks

    def step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.lr_at(self.step_count)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise LearnerDivergedError.at(self.module, norm, self.step_count)
        self.step_count += 1
        return norm

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self._params.items():
            with deepspeed.zero.GatheredParameters([p], enabled=self._parts):
                yield name, p.detach()

    @torch.no_grad()
    def load_parameters(self, tensors: Callable[[str], Tensor]) -> None:
        for name, p in self._params.items():
            value = tensors(name).to(p.device)
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self._parts):
                p.copy_(value)
            self._set(p, value.float())

    def masters(self) -> Iterator[tuple[str, Tensor]] | None:
        if not self._engine.bfloat16_enabled():
            return None
        return ((name, safe_get_full_fp32_param(p)) for name, p in self._params.items())

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.step_count:
            for name, p in self._params.items():
                yield f"{name}/step", torch.tensor(float(self.step_count))
                for key in MOMENTS[1:]:
                    yield f"{name}/{key}", safe_get_full_optimizer_state(p, key)

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        stepped = {key.rpartition("/")[0] for key in tensors}
        expected = {
            f"{name}/{key}": torch.Size() if key == "step" else shape
            for name, shape in self.shapes.items()
            if name in stepped
            for key in MOMENTS
        }
        check_tensors(f"optimizer of {type(self.module).__name__}", tensors, expected)
        self._make_moments()
        for name, p in self._params.items():
            for key in MOMENTS[1:]:
                value = tensors.get(f"{name}/{key}")
                whole = torch.zeros(self.shapes[name]) if value is None else value
                self._set(p, whole.to(p.device), key)
        for part in self._flat_parts():
            self._optimizer.optimizer.state[part]["step"].fill_(float(step_count))
        self.step_count = step_count

    def snapshot(self) -> Snapshot:
        return [self._own(p).detach().clone() for p in self._params.values()]

    @contextmanager
    def using(self, snapshot: Snapshot) -> Iterator[None]:
        present = [self._own(p).data for p in self._params.values()]
        try:
            self._swap(snapshot)
            yield
        finally:
            self._swap(present)

    def _swap(self, parts: Snapshot) -> None:
        self._engine.empty_partition_cache()  # parameters that are whole just now would stay as they are
        for p, part in zip(self._params.values(), parts, strict=True):
            self._own(p).data = part

    def _own(self, p: nn.Parameter) -> Tensor:
        """This rank's part of a parameter: all of it below stage 3."""
        part: Tensor = getattr(p, "ds_tensor") if self._parts else p  # noqa: B009 (DeepSpeed adds it)
        return part

    def _set(self, p: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        """A master parameter, or a moment of it."""
        if not self._parts:
            if moment is None:
                safe_set_full_fp32_param(p, whole)
            else:
                safe_set_full_optimizer_state(p, whole, moment)
            return
        size = self._own(p).numel()  # the last part is padded, which DeepSpeed's own way with wholes forgets
        flat = pad(whole.flatten(), (0, size * self._ranks.size - whole.numel()))
        part = flat[size * self._ranks.rank :][:size]
        if moment is None:
            safe_set_local_fp32_param(p, part)
        else:
            safe_set_local_optimizer_state(p, part, moment)

    def _flat_parts(self) -> list[Tensor]:
        """What the optimizer steps: this rank's part of all parameters, in float32, one tensor for each group."""
        if self._parts:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return [part for group in self._optimizer.optimizer.param_groups for part in group["params"]]

    def _make_moments(self) -> None:
        """AdamW makes them at its first step."""
        for p in self._flat_parts():
            state = self._optimizer.optimizer.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        if not self._parts:
            self._optimizer._lazy_init_hp_params_optimizer_state()  # what ``safe_get…`` and ``safe_set…`` look at


def whole_shape(p: nn.Parameter) -> torch.Size:
    """Of the whole."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def settings_of(config: DeepSpeedLearnerConfig, schedule: Schedule | None, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration; ``schedule=None``: of one that only makes models."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # not read: a step is what the caller says it is
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if schedule is None else schedule.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
