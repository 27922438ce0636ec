"""TorchRL's value-estimator interface around the pure functions of :mod:`vapo_async.objectives.advantage`."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch, set_skip_existing
from torch import Tensor
from torchrl.objectives.utils import hold_out_net
from torchrl.objectives.value import GAE

from vapo_async.objectives.advantage import generalized_advantage, length_adaptive_lambda, value_targets
from vapo_async.objectives.checks import describe


class LengthAdaptiveGAE(GAE):
    """VAPO's advantages and value targets (arXiv 2504.05118), used like :class:`~torchrl.objectives.value.GAE`.

    Each row of the input is one response. The policy's advantage takes λ = 1 − 1/(α·l) from the row's own number of
    response tokens, the value target the critic's own λ (decoupled GAE). Reads ``state_value``,
    ``("next", "state_value")``, ``("next", "reward")``, ``("next", "done")`` and ``("next", "terminated")``, each
    [B, T, 1], and ``response_mask`` [B, T] bool; writes ``advantage`` and ``value_target``, [B, T, 1], 0 outside the
    mask, where nothing is read. A response whose last token is not ``terminated`` bootstraps from its next value, as in
    ``GAE``.

    Args:
        gamma: discount in [0, 1].
        alpha: α of the length-adaptive λ.
        lmbda: a fixed λ for all rows; None = length-adaptive.
        lmbda_critic: λ of the value target.
        value_network: computes the values of the tokens and of ``"next"``; None = they are in the input.
        differentiable: lets gradients pass through the values.
        skip_existing: as in ``GAE``.
        device: of the buffers.
        deactivate_vmap: as in ``GAE``.

    Examples:
        >>> estimator = LengthAdaptiveGAE(gamma=1.0, alpha=0.05)
        >>> batch = estimator(batch)
    """

    @dataclass
    class _AcceptedKeys(GAE._AcceptedKeys):
        # Repeated, as ``set_keys`` only knows the fields that the class itself spells.
        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        steps_to_next_obs: NestedKey = "steps_to_next_obs"
        sample_log_prob: NestedKey | None = None
        response_mask: NestedKey = "response_mask"

    default_keys = _AcceptedKeys

    def __init__(
        self,
        gamma: float = 1.0,
        alpha: float = 0.05,
        lmbda: float | None = None,
        lmbda_critic: float = 1.0,
        value_network: TensorDictModule | None = None,
        *,
        differentiable: bool = False,
        skip_existing: bool | None = None,
        device: torch.device | None = None,
        deactivate_vmap: bool = False,
    ) -> None:
        super().__init__(
            gamma=_float64(gamma),
            lmbda=_float64(float("nan") if lmbda is None else lmbda),  # NaN: no use of GAE's recursion goes unnoticed
            value_network=value_network,
            differentiable=differentiable,
            skip_existing=skip_existing,
            device=device,
            deactivate_vmap=deactivate_vmap,
        )
        self.length_adaptive = lmbda is None
        self.alpha = alpha
        self.register_buffer("lmbda_critic", _float64(lmbda_critic).to(device))

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        names = [keys.value] if self.value_network is None else list(self.value_network.in_keys)
        names += [("next", name) if isinstance(name, str) else ("next", *name) for name in names]
        return [
            *names,
            ("next", keys.reward),
            ("next", keys.done),
            ("next", keys.terminated),
            keys.response_mask,
        ]

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
    ) -> TensorDictBase:
        """Writes advantages and value targets into ``tensordict`` and returns it.

        Args:
            tensordict: see the class.
            params: parameters of a functional value network.
            target_params: those for the next values; None = ``params``.
        """
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            value, next_value, reward, mask = self._signals(tensordict, params, target_params)
            lmbda = length_adaptive_lambda(mask.sum(1), self.alpha) if self.length_adaptive else self.lmbda
            advantage = generalized_advantage(value, reward, mask, float(self.gamma), lmbda, next_value)
            target = value_targets(value, reward, mask, float(self.gamma), self.lmbda_critic, next_value)
        tensordict.set(self.tensor_keys.advantage, advantage.unsqueeze(-1))
        tensordict.set(self.tensor_keys.value_target, target.unsqueeze(-1))
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The value target alone, [B, T, 1]."""
        value, next_value, reward, mask = self._signals(tensordict, params, target_params)
        return value_targets(value, reward, mask, float(self.gamma), self.lmbda_critic, next_value).unsqueeze(-1)

    def _signals(
        self, tensordict: TensorDictBase, params: TensorDictBase | None, target_params: TensorDictBase | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Value, next value (0 after a terminal action), reward and mask, [B, T] each."""
        keys = self.tensor_keys
        if self.value_network is not None:
            if params is not None:
                params = params.detach()
                target_params = params.clone(False) if target_params is None else target_params
            held = hold_out_net(self.value_network) if params is None and target_params is None else nullcontext()
            with held, set_skip_existing(self.skip_existing) if self.skip_existing is not None else nullcontext():
                self._call_value_nets(
                    data=tensordict,
                    params=params,
                    next_params=target_params,
                    single_call=False,
                    value_key=keys.value,
                    detach_next=True,
                    vmap_randomness=self.vmap_randomness,
                )
        value = _entry(tensordict, keys.value)
        next_value = _entry(tensordict, ("next", keys.value)).detach()
        reward = _entry(tensordict, ("next", keys.reward))
        done = _entry(tensordict, ("next", keys.done))
        terminated = done if (t := tensordict.get(("next", keys.terminated), None)) is None else t.squeeze(-1)
        mask = tensordict.get(keys.response_mask, None)
        if mask is None:
            raise ValueError(
                f"the input has no '{keys.response_mask}': a bool entry [B, T], True on response tokens, is needed"
            )
        mask = mask.squeeze(-1) if mask.ndim == value.ndim + 1 else mask
        if mask.shape != value.shape:
            raise ValueError(f"expected equal shapes, got {describe(state_value=value, response_mask=mask)}")
        if bool(((mask & done).cumsum(1) - (mask & done).long() > 0)[mask].any()):
            raise ValueError("a row goes on after 'done': each row must hold one response; split it into rows")
        return value, torch.where(terminated, 0.0, next_value), reward, mask


def _float64(number: float) -> Tensor:
    """A factor as a scalar that keeps its digits: TorchRL's own buffers round it to float32."""
    return torch.tensor(number, dtype=torch.float64)


def _entry(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """Entry [B, T, 1] as [B, T]."""
    entry = tensordict.get(key, None)
    if entry is None:
        raise ValueError(f"the input has no '{key}', an entry of shape [B, T, 1]")
    if entry.ndim != 3 or entry.shape[-1] != 1:
        raise ValueError(f"expected '{key}' of shape [B, T, 1], got {list(entry.shape)}")
    return entry.squeeze(-1)
