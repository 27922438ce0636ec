"""TorchRL's value-estimator interface around the pure functions of :mod:`vapo_async.objectives.advantage`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch, set_skip_existing
from torch import Tensor
from torchrl.objectives.utils import hold_out_net
from torchrl.objectives.value import GAE

from vapo_async.objectives.advantage import (
    generalized_advantage,
    length_adaptive_lambda,
    trajectory_lengths,
    value_targets,
    vtrace_targets,
)
from vapo_async.objectives.registry import register_for_losses
from vapo_async.objectives.signals import (
    MaskedEstimator,
    Signals,
    check_batch_size,
    check_finite,
    following,
    named_time,
    read,
    read_signals,
)


@register_for_losses("length_adaptive_gae", gamma=1.0, alpha=0.05)
class LengthAdaptiveGAE(MaskedEstimator, GAE):
    """VAPO's advantages and value targets (arXiv 2504.05118), used where :class:`~torchrl.objectives.value.GAE` is.

    The policy's advantage takes λ = 1 − 1/(α·l) from the number l of actions of its own trajectory, the value target
    the critic's own λ (decoupled GAE, arXiv 2503.01491).

    Reads ``state_value``, ``("next", "state_value")``, ``("next", "reward")``, ``("next", "done")`` and
    ``("next", "terminated")``, each [*B, T, *F], usually [B, T, 1], and ``response_mask`` [*B, T] bool, the actions.
    Writes ``advantage`` and ``value_target``, shaped like the value, float32 (float64 if an input is), 0 outside the
    mask, where nothing is read: padding may be NaN, on either side, and environment tokens may lie in between.

    As in ``GAE``, ``terminated`` stops bootstrapping and ``done`` ends a trajectory; a row may hold several. Where
    actions just stop, as at a truncation, the last one bootstraps from its next value unless it is ``terminated``.
    Without a ``terminated`` entry ``done`` counts as such. The next value of an action is what its entry says, also in
    front of environment tokens: for the exact reward-to-go as target it must be that of the trajectory's next action.

    Entries may also be jagged (``torch.jagged`` nested tensors [B, jagged, *F] in a TensorDict of batch size [B]), or
    packed: responses one after another in a row, told apart by the int64 entry [*B, T] that
    ``set_keys(segment_ids=...)`` names. ``set_keys(response_mask=None)`` makes every step an action.

    As in ``GAE``, time is the TensorDict's last batch dimension, or the one named "time", or ``time_dim``; a mask with
    more dimensions than the TensorDict settles it, too, and where it stays unclear that is an error.

    Args:
        gamma: discount in [0, 1].
        alpha: α > 0 of the length-adaptive λ.
        lmbda: a fixed λ in [0, 1] for the policy; None = length-adaptive.
        lmbda_critic: λ in [0, 1] of the value target.
        value_network: computes the values of the steps and of ``"next"``; None = they are in the input.
        lmbda_key: the policy's λ is read from this entry, [*B] or [*B, 1] per row, or [*B, T] per step.
        vtrace: the value target is V-trace's (arXiv 1802.01561): reads ``sample_log_prob`` of the behaviour and
            ``prox_log_prob`` of the current policy, [*B, T].
        rho_cap: V-trace's ρ̄ > 0.
        c_cap: V-trace's c̄ > 0.
        average_gae: standardises the advantage over the masked steps of the input.
        differentiable: lets gradients pass through the values.
        skip_existing: as in ``GAE``.
        shifted: as in ``GAE``.
        device: of the buffers.
        time_dim: as in ``GAE``.
        deactivate_vmap: as in ``GAE``.

    Raises:
        ValueError: a parameter out of range; an entry that is missing, of the wrong shape, or not finite on an action;
            a row without any action.
        TypeError: an entry of the wrong dtype.

    Examples:
        >>> estimator = LengthAdaptiveGAE(gamma=1.0, alpha=0.05)
        >>> batch = estimator(batch)
    """

    def __init__(
        self,
        gamma: float | Tensor = 1.0,
        alpha: float = 0.05,
        lmbda: float | Tensor | None = None,
        lmbda_critic: float | Tensor = 1.0,
        value_network: TensorDictModule | None = None,
        *,
        lmbda_key: NestedKey | None = None,
        vtrace: bool = False,
        rho_cap: float = 1.0,
        c_cap: float = 1.0,
        average_gae: bool = False,
        differentiable: bool = False,
        skip_existing: bool | None = None,
        shifted: bool = False,
        device: torch.device | None = None,
        time_dim: int | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        if lmbda is not None and lmbda_key is not None:
            raise ValueError(f"lmbda ({lmbda}) and lmbda_key ({lmbda_key!r}) exclude each other: give one of them")
        for name, number in {"alpha": alpha, "rho_cap": rho_cap, "c_cap": c_cap}.items():
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        super().__init__(
            gamma=_factor("gamma", gamma),
            # NaN: no use of GAE's own recursion goes unnoticed.
            lmbda=torch.tensor(torch.nan).double() if lmbda is None else _factor("lmbda", lmbda),
            value_network=value_network,
            average_gae=average_gae,
            differentiable=differentiable,
            skip_existing=skip_existing,
            shifted=shifted,
            device=device,
            time_dim=time_dim,
            deactivate_vmap=deactivate_vmap,
        )
        self.register_buffer("lmbda_critic", _factor("lmbda_critic", lmbda_critic).to(self._device))
        self.length_adaptive = lmbda is None and lmbda_key is None
        self.alpha = alpha
        self.lmbda_key = lmbda_key
        self.vtrace = vtrace
        self.rho_cap = rho_cap
        self.c_cap = c_cap

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        names = [keys.value] if self.value_network is None else list(self.value_network.in_keys)
        names += [following(name) for name in [*names, keys.reward, keys.done, keys.terminated]]
        names += [keys.sample_log_prob, keys.prox_log_prob] if self.vtrace else []
        return [*names, *(key for key in (keys.response_mask, keys.segment_ids, self.lmbda_key) if key is not None)]

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Writes advantages and value targets into ``tensordict`` and returns it.

        Args:
            tensordict: see the class.
            params: parameters of a functional value network.
            target_params: those for the next values; None = ``params``.
            time_dim: overrides that of the class.
        """
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            s = self._signals(tensordict, params, target_params, time_dim)
            lmbda, gamma = self._lambda(tensordict, s), float(self.gamma)
            advantage = generalized_advantage(s.value, s.reward, s.mask, gamma, lmbda, s.next_value, s.ends)
            target = self._targets(s)
            check_finite(advantage.sum() + target.sum(), s, self.tensor_keys)
            if self.average_gae:
                advantage = self._normalize_advantage(advantage, s.mask)
        tensordict.set(self.tensor_keys.advantage, s.layout.restore(advantage))
        tensordict.set(self.tensor_keys.value_target, s.layout.restore(target))
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The value target alone, shaped like the value."""
        s = self._signals(tensordict, params, target_params, time_dim)
        target = self._targets(s)
        check_finite(target.sum(), s, self.tensor_keys)
        return s.layout.restore(target)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LengthAdaptiveGAE":
        """Moves the buffers, but keeps their dtype: ``loss.bfloat16()`` must not make 0.999 of γ a 1."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def _targets(self, s: Signals) -> Tensor:
        gamma, lmbda = float(self.gamma), float(self.lmbda_critic)
        if not self.vtrace:
            return value_targets(s.value, s.reward, s.mask, gamma, lmbda, s.next_value, s.ends)
        sample_log_prob, prox_log_prob = s.log_probs
        return vtrace_targets(
            s.value,
            s.reward,
            s.mask,
            gamma,
            lmbda,
            log_ratio=prox_log_prob - sample_log_prob,
            rho_cap=self.rho_cap,
            c_cap=self.c_cap,
            next_value=s.next_value,
            ends=s.ends,
        )

    def _normalize_advantage(self, adv: Tensor, valid: Tensor, groups: None = None) -> Tensor:
        """As in ``GAE``, by mean and standard deviation of the steps that are ``valid``; 0 elsewhere."""
        count = valid.sum()
        centred = torch.where(valid, adv - adv.sum() / count, 0.0)
        return centred / (centred.square().sum() / (count - 1).clamp_min(1)).clamp_min(1e-8).sqrt()

    def _signals(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
        time_dim: int | None,
    ) -> Signals:
        check_batch_size(tensordict)
        keys = self.tensor_keys
        steps = tensordict.get(keys.steps_to_next_obs, None)
        if steps is not None and float(self.gamma) < 1 and bool((steps != 1).any()):
            raise ValueError(
                f"{keys.steps_to_next_obs!r} is not all 1: multi-step rewards are only supported at gamma 1"
            )
        named = named_time(tensordict)
        time_dim = next((dim for dim in (time_dim, self.time_dim, named) if dim is not None), None)
        valid = None if self.value_network is None else self._call_network(tensordict, params, target_params)
        signals = read_signals(tensordict, keys, time_dim=time_dim, valid=valid, log_probs=self.vtrace)
        if valid is not None and signals.layout.time != (tensordict.ndim - 1 if named is None else named):
            raise ValueError("shifted needs time as the TensorDict's last batch dimension, or as the one named 'time'")
        return signals

    def _call_network(
        self, tensordict: TensorDictBase, params: TensorDictBase | None, target_params: TensorDictBase | None
    ) -> Tensor | None:
        """Computes the values into ``tensordict``; returns which steps ``shifted`` could keep, [*B, T] (None = all)."""
        key, network = self.tensor_keys.value, self.value_network
        if params is not None:
            params = params.detach()
            target_params = params.clone(False) if target_params is None else target_params
        held = hold_out_net(network) if params is None and target_params is None else nullcontext()
        skip = nullcontext() if self.skip_existing is None else set_skip_existing(self.skip_existing)
        with held, skip:
            if read(tensordict, following(self.tensor_keys.reward)).is_nested:
                # TorchRL stacks both times for one vmapped call, which jagged tensors do not know.
                value, next_value = (
                    _apply_network(network, data, key, p)
                    for data, p in ((tensordict, params), (tensordict.get("next"), target_params))
                )
                next_value, valid = next_value.detach(), None
            else:
                value, next_value, valid = self._call_value_nets(
                    data=tensordict,
                    params=params,
                    next_params=target_params,
                    single_call=self.shifted,
                    value_key=key,
                    detach_next=True,
                    vmap_randomness=self.vmap_randomness,
                )
        tensordict.set(key, value).set(following(key), next_value)
        if valid is not None:
            tensordict.set("shifted_valid", valid)
        return valid

    def _lambda(self, tensordict: TensorDictBase, s: Signals) -> float | Tensor:
        """The policy's λ: one for all, one per row [N], or one per step [N, T]."""
        if self.lmbda_key is not None:
            lmbda = s.layout.per_row_or_step(self.lmbda_key, read(tensordict, self.lmbda_key))
            lmbda = lmbda if lmbda.ndim == 1 else torch.where(s.mask, lmbda, 0.0)
            inside = (lmbda >= 0) & (lmbda <= 1)
            if not bool(inside.all()):
                raise ValueError(f"expected {self.lmbda_key!r} in [0, 1] on actions, got {float(lmbda[~inside][0])}")
            return lmbda
        if not self.length_adaptive:
            return float(self.lmbda)
        if s.ends is None and s.row_lengths is not None:
            return length_adaptive_lambda(s.row_lengths, self.alpha)
        return length_adaptive_lambda(trajectory_lengths(s.mask, s.ends), self.alpha)


def _factor(name: str, number: float | Tensor) -> Tensor:
    """A factor in [0, 1] as a scalar that keeps its digits: TorchRL's own buffers round it to float32."""
    factor = torch.as_tensor(number, dtype=torch.float64)
    if factor.numel() != 1 or not 0 <= float(factor) <= 1:
        raise ValueError(f"{name} must be one number in [0, 1], got {number}")
    return factor.reshape(())


def _apply_network(
    network: TensorDictModule, data: TensorDictBase, key: NestedKey, params: TensorDictBase | None
) -> Tensor:
    placed = nullcontext() if params is None else params.to_module(network, preserve_module_state=False)
    with placed:
        return network(data.select(*network.in_keys, key, strict=False)).get(key)
