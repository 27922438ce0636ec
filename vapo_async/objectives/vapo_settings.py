"""The arguments of the loss: checked, and its coefficients as buffers that a scheduler changes."""

import math
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchrl.objectives import LossModule

from vapo_async.objectives.settings import Coefficient, PolicySettings

Kind = TypeVar("Kind", bound=Enum)

ABOVE = {"dual_clip": 1, "behaviour_weight_cap": 0, "clip_value": 0}
AT_LEAST = {"nll_coeff": 0, "entropy_coeff": 0, "kl_coeff": 0, "critic_coeff": 0}


class CoefficientBuffers(LossModule):
    """A loss whose coefficients are float64 buffers, which keep their digits when the module is cast; None is off."""

    _schedulable_buffers = frozenset({"clip_low", "clip_high", *ABOVE, *AT_LEAST})

    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor | None
    behaviour_weight_cap: Tensor | None
    clip_value: Tensor | None
    nll_coeff: Tensor | None
    entropy_coeff: Tensor | None
    kl_coeff: Tensor | None
    critic_coeff: Tensor | None
    _settings: PolicySettings

    @property
    def settings(self) -> PolicySettings:
        """The policy's objective, with the coefficients as they are now."""
        return replace(
            self._settings,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            behaviour_weight_cap=self.behaviour_weight_cap,
            nll_coef=self.nll_coeff,
            entropy_coef=self.entropy_coeff,
            kl_coef=self.kl_coeff,
        )

    @property
    def clip_epsilon(self) -> tuple[Tensor, Tensor]:
        """(ε_low, ε_high); to be set to one number or to a pair."""
        return self.clip_low, self.clip_high

    @clip_epsilon.setter
    def clip_epsilon(self, value: float | tuple[float, float]) -> None:
        self.clip_low, self.clip_high = _clip_range(value)  # type: ignore[assignment]

    def _register_coefficients(
        self,
        clip_epsilon: float | tuple[float, float],
        device: torch.device | None,
        **coefficients: Coefficient | None,
    ) -> None:
        """Makes the buffers, None where a term is off; ``ValueError`` for a number out of range."""
        low, high = _clip_range(clip_epsilon)
        for name, value in {"clip_low": low, "clip_high": high, **coefficients}.items():
            self.register_buffer(name, _checked(name, value, device))

    def __setattr__(self, name: str, value: object) -> None:
        """Checks a coefficient and keeps it a buffer: a number goes into it in place, None takes it away."""
        if name not in self._schedulable_buffers:
            super().__setattr__(name, value)
            return
        old = self._buffers.get(name)
        device = self.clip_low.device if old is None else old.device
        new = _checked(name, value, device)
        if old is not None and new is not None and not isinstance(value, Tensor):
            old.copy_(new)
        else:
            self.register_buffer(name, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CoefficientBuffers":
        """Moves the buffers, but keeps their dtype: in bfloat16 a range of 0.28 would be one of 0.2793."""
        kept = {name: self._buffers[name] for name in self._schedulable_buffers if name in self._buffers}
        if recurse:
            super()._apply(fn)
        else:  # which TorchRL's own does not take
            nn.Module._apply(self, fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None:
                self._buffers[name] = buffer.to(moved.device)
        return self


def check_network(name: str, network: object) -> None:
    """Raises ``ValueError`` unless the actor has a distribution, and actor and critic say what they read and write."""
    needs = ["in_keys", "out_keys", *(["get_dist"] if name == "actor_network" else [])]
    missing = [need for need in needs if not hasattr(network, need)]
    if network is not None and missing:
        wrap = "ProbabilisticActor" if name == "actor_network" else "TensorDictModule or ValueOperator"
        raise ValueError(f"{name} has no {', '.join(missing)}, got {type(network).__name__}: wrap it in a {wrap}")


def kind_of(name: str, value: Kind | str, kinds: type[Kind]) -> Kind:
    """The member that ``value`` is or names; ``ValueError`` that lists the names."""
    if isinstance(value, kinds):
        return value
    names = [kind.value for kind in kinds]
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")
    return kinds(value)


def _clip_range(clip_epsilon: object) -> tuple[float, float]:
    """(ε_low, ε_high)."""
    pair = tuple(clip_epsilon) if isinstance(clip_epsilon, tuple | list) else (clip_epsilon, clip_epsilon)
    if len(pair) != 2 or not all(_is_number(x) for x in pair) or not (0 <= pair[0] < 1 and 0 <= pair[1] < math.inf):
        raise ValueError(
            f"clip_epsilon must be one number or (low, high) with 0 <= low < 1 and high >= 0, got {clip_epsilon!r}"
        )
    return float(pair[0]), float(pair[1])


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked(name: str, value: Any, device: torch.device | None) -> Tensor | None:
    """The coefficient's buffer, float64 []; a tensor's value is checked on a CPU only, a GPU would have to be awaited.

    ``ValueError`` for what is no number, or out of range.
    """
    optional = name in ABOVE or name in AT_LEAST
    if value is None and optional:
        return None
    above = name in ABOVE
    expected = f"above {ABOVE[name]}" if above else f"at least {AT_LEAST.get(name, 0)}"
    expected += ", or None to switch it off" if optional else " and below 1" if name == "clip_low" else ""
    if not _is_number(value):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be a number {expected}, got {got}")
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        number = float(value)
        fits = number > ABOVE[name] if above else number >= AT_LEAST.get(name, 0)
        if not (fits and math.isfinite(number)) or (name == "clip_low" and number >= 1):
            raise ValueError(f"{name} must be {expected}, got {number:g}")
    return torch.as_tensor(value, device=device, dtype=torch.float64).reshape(())
