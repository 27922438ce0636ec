"""VAPO as a TorchRL loss module around the pure functions of :mod:`vapo_async.objectives.losses`."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams, dispatch
from torch import Tensor
from torchrl.objectives import LossModule, ValueEstimators
from torchrl.objectives.utils import dispatch_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from vapo_async.config import AlgorithmConfig, ImportanceKind, LossAggregation
from vapo_async.objectives.estimators import LengthAdaptiveGAE
from vapo_async.objectives.losses import (
    Denominators,
    denominators_of,
    policy_metrics,
    policy_terms,
    value_metrics,
    vapo_value_loss,
)


class VAPOLoss(LossModule):
    """VAPO's loss (arXiv 2504.05118) over token-level trajectories, used like :class:`~torchrl.objectives.ClipPPOLoss`.

    The input's rows are responses: the keys below, [B, T] or [B, T, 1], and what the networks read. ``loss_*`` entries
    of the output come with their coefficients: their sum is what to minimise. The other entries are metrics. Where
    ``advantage`` is missing, the value estimator (:class:`LengthAdaptiveGAE` unless another is made) computes it.

    The losses are divided by the counts of the input, unless ``denominators`` holds those of the whole optimizer
    mini-batch: set it before feeding micro-batches, and their losses and gradients add up.

    Args:
        actor_network: a module with ``get_dist(tensordict)`` whose distribution has the action's log-prob per token.
        critic_network: writes ``state_value``; None = no critic loss.
        clip_epsilon: ε, or (ε_low, ε_high).
        importance: ``naive`` clips π_θ/π_behav; ``decoupled`` clips π_θ/π_prox and reads ``prox_log_prob``.
        behaviour_weight_cap: bound of π_prox/π_behav in the decoupled objective; None = none.
        nll_coeff: μ of the positive-example loss, which reads ``correct``; 0 = off.
        entropy_coeff: weight of the entropy bonus; 0 = off, and no entropy is computed.
        critic_coeff: weight of the critic's loss ½ (V − R)².
        clip_value: range of the value clipping; None = off.
        aggregation: ``token`` or ``sequence``.
        functional: True moves the parameters out of the networks, as TorchRL's losses do by default; it does not go
            with FSDP or DeepSpeed.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys of the input, changed by ``set_keys``."""

        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = "state_value"
        sample_log_prob: NestedKey = "sample_log_prob"
        prox_log_prob: NestedKey = "prox_log_prob"
        action: NestedKey = "action"
        response_mask: NestedKey = "response_mask"
        correct: NestedKey = "correct"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    default_keys = _AcceptedKeys
    default_value_estimator = LengthAdaptiveGAE

    actor_network: TensorDictModule
    critic_network: TensorDictModule | None
    actor_network_params: TensorDictParams | None
    critic_network_params: TensorDictParams | None
    target_actor_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModule,
        critic_network: TensorDictModule | None = None,
        *,
        clip_epsilon: float | tuple[float, float] = (0.2, 0.28),
        importance: ImportanceKind | str = ImportanceKind.naive,
        behaviour_weight_cap: float | None = 5.0,
        nll_coeff: float = 0.1,
        entropy_coeff: float = 0.0,
        critic_coeff: float = 1.0,
        clip_value: float | None = None,
        aggregation: LossAggregation | str = LossAggregation.token,
        functional: bool = False,
    ) -> None:
        self._functional = functional
        super().__init__()
        self.critic_network = None
        for name, network in (("actor_network", actor_network), ("critic_network", critic_network)):
            if functional and network is not None:
                self.convert_to_functional(network, name)
            else:
                setattr(self, name, network)
                setattr(self, f"{name}_params", None)
        low, high = clip_epsilon if isinstance(clip_epsilon, tuple) else (clip_epsilon, clip_epsilon)
        self.algorithm = AlgorithmConfig(
            clip_low=low,
            clip_high=high,
            importance=ImportanceKind(importance),
            behaviour_weight_cap=behaviour_weight_cap,
            nll_coef=nll_coeff,
            entropy_coef=entropy_coeff,
            aggregation=LossAggregation(aggregation),
            value_clip=clip_value,
        )
        self.critic_coeff = critic_coeff
        self.denominators: Denominators | None = None
        log_prob_keys = getattr(actor_network, "log_prob_keys", None)
        if log_prob_keys:
            self.set_keys(sample_log_prob=log_prob_keys[0], action=actor_network.dist_sample_keys[0])

    @property
    def functional(self) -> bool:
        return self._functional

    @property
    def in_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        names: list[NestedKey] = [*self.actor_network.in_keys, keys.action, keys.sample_log_prob, keys.response_mask]
        if self.algorithm.importance is ImportanceKind.decoupled:
            names.append(keys.prox_log_prob)
        if self.algorithm.nll_coef != 0:
            names.append(keys.correct)
        names.append(keys.advantage)
        if self.critic_network is not None:
            names += [*self.critic_network.in_keys, keys.value_target]
            names += [keys.value] if self.algorithm.value_clip is not None else []
        return list(dict.fromkeys(names))

    @property
    def out_keys(self) -> list[str]:
        keys = ["loss_objective"]
        if self.algorithm.nll_coef != 0:
            keys.append("loss_nll")
        if self.algorithm.entropy_coef != 0:
            keys += ["loss_entropy", "entropy"]
        if self.critic_network is not None:
            keys += ["loss_critic", "explained_variance"]
        return [*keys, "nll", "clip_low", "clip_high", "kl_behaviour", "ess"]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        if self._value_estimator is not None:
            self._value_estimator.set_keys(**self._estimator_keys(self._value_estimator))

    def _estimator_keys(self, estimator: ValueEstimatorBase) -> dict[str, NestedKey]:
        names = ["advantage", "value_target", "value", "reward", "done", "terminated"]
        if isinstance(estimator, LengthAdaptiveGAE):
            names.append("response_mask")
        return {name: getattr(self.tensor_keys, name) for name in names}

    def _default_value_estimator(self) -> None:
        self.make_value_estimator()

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> "VAPOLoss":
        """Chooses what computes missing advantages; None = :class:`LengthAdaptiveGAE` with ``hyperparams``."""
        if value_type is None:
            value_type = LengthAdaptiveGAE
        if isinstance(value_type, ValueEstimators):
            value_type, hyperparams = self._prepare_value_estimator_kwargs(value_type, **hyperparams)
            keys = {name: getattr(self.tensor_keys, name) for name in self._value_estimator_default_keys}
            supported = (ValueEstimators.TD0, ValueEstimators.TD1, ValueEstimators.TDLambda, ValueEstimators.GAE)
            dispatch_value_estimator(self, value_type, supported=supported, tensor_keys=keys, **hyperparams)
            return self
        estimator = (
            value_type if isinstance(value_type, ValueEstimatorBase) else value_type.for_loss(self, **hyperparams)
        )
        self._value_estimator = estimator
        self.value_type = type(estimator)
        self._forward_value_estimator_keys()
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and metrics of one (micro-)batch of responses, see the class."""
        tensordict = tensordict.copy()
        keys, algorithm = self.tensor_keys, self.algorithm
        if tensordict.get(keys.advantage, None) is None:
            self.value_estimator(tensordict, **self._estimator_params())
        with self._parameters_of("actor_network"):
            dist = self.actor_network.get_dist(tensordict)
        log_prob = _per_token(dist.log_prob(tensordict.get(keys.action)))
        mask = self._required(tensordict, keys.response_mask)
        decoupled = algorithm.importance is ImportanceKind.decoupled
        correct = mask.new_zeros(len(mask)) if algorithm.nll_coef == 0 else self._correct(tensordict, mask)
        denominators = self.denominators or denominators_of(mask, correct)
        losses, sums = policy_terms(
            log_prob,
            None if algorithm.entropy_coef == 0 else _per_token(dist.entropy()),
            mask=mask,
            advantage=self._required(tensordict, keys.advantage),
            sample_log_prob=self._required(tensordict, keys.sample_log_prob),
            prox_log_prob=self._required(tensordict, keys.prox_log_prob) if decoupled else None,
            correct=correct,
            algorithm=algorithm,
            denominators=denominators,
        )
        metrics = policy_metrics(sums)
        if self.critic_network is not None:
            old_value = None if algorithm.value_clip is None else self._required(tensordict, keys.value)
            with self._parameters_of("critic_network"):
                value = _per_token(self.critic_network(tensordict).get(keys.value))
            loss, value_sums = vapo_value_loss(
                value,
                self._required(tensordict, keys.value_target),
                mask=mask,
                denominators=denominators,
                old_value=old_value,
                clip=algorithm.value_clip,
            )
            losses["loss_critic"] = self.critic_coeff * loss
            metrics |= value_metrics(value_sums)
        out = {k: log_prob.new_tensor(metrics[k]) for k in self.out_keys if not k.startswith("loss_")}
        return TensorDict(losses | out)

    def _required(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        entry = tensordict.get(key, None)
        if entry is None:
            raise ValueError(f"the input has no '{key}'; rename it with set_keys or add it, one entry per token [B, T]")
        return _per_token(entry)

    def _correct(self, tensordict: TensorDictBase, mask: Tensor) -> Tensor:
        """The verdict per row, from an entry [B], [B, 1], or one that repeats it on every token."""
        correct = tensordict.get(self.tensor_keys.correct, None)
        if correct is None:
            raise ValueError(
                f"nll_coeff is not 0, but the input has no '{self.tensor_keys.correct}', bool [B] or [B, T]"
            )
        correct = correct.reshape(len(mask), -1)
        return correct[:, 0] if correct.shape[1] == 1 else (correct & mask).any(1)

    def _parameters_of(self, name: str) -> Any:
        """Puts a functional network's parameters in place for the time of a call."""
        if not self.functional:
            return nullcontext()
        return getattr(self, f"{name}_params").to_module(getattr(self, name), preserve_module_state=False)

    def _estimator_params(self) -> dict[str, Any]:
        if self.critic_network_params is None:
            return {}
        return {"params": self.critic_network_params.detach(), "target_params": self.target_critic_network_params}


def _per_token(entry: Tensor) -> Tensor:
    """[B, T] or [B, T, 1] as [B, T]."""
    return entry.squeeze(-1) if entry.ndim == 3 and entry.shape[-1] == 1 else entry
