"""VAPO as a TorchRL loss module around the pure functions of :mod:`vapo_async.objectives.losses`."""

from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictParams, dispatch
from torchrl.objectives.utils import ValueEstimators, build_value_estimator
from torchrl.objectives.value import ValueEstimatorBase

from vapo_async.config.algorithm import ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.checks import at_least_float32
from vapo_async.objectives.estimators import LengthAdaptiveGAE
from vapo_async.objectives.group_estimator import GroupRelativeAdvantage
from vapo_async.objectives.losses import Denominators, policy_metrics
from vapo_async.objectives.settings import Coefficient, PolicySettings
from vapo_async.objectives.vapo_distribution import distribution_of, log_prob_and_entropy
from vapo_async.objectives.vapo_inputs import Key, StepInputs, VAPOKeys, step_mask, value_of
from vapo_async.objectives.vapo_metrics import AGE_EDGES, LENGTH_EDGES, CriticSteps
from vapo_async.objectives.vapo_settings import CoefficientBuffers, check_network, kind_of
from vapo_async.objectives.vapo_terms import UNDIVIDED, PolicyBatch, keys_of, needed_names


class VAPOLoss(CoefficientBuffers):
    """VAPO's loss (arXiv 2504.05118), used like :class:`~torchrl.objectives.ClipPPOLoss` (docs/torchrl.md).

    The input holds steps, [B, T] with a row per response (or a packed row of several), or flat, [N]; each entry below
    has that shape, with or without a last dimension of 1. Only steps in ``response_mask`` count; nothing else is read
    outside it. Where ``advantage`` is missing, the value estimator computes it first.

    The output's ``loss_*`` entries come with their coefficients: their sum is what to minimise. The others are detached
    scalars to log, computed without waiting for the device.

    ``denominators`` (None by default: the input is the whole mini-batch) holds the counts of an optimizer mini-batch
    that is fed in micro-batches or over ranks: their losses and gradients then add up to the whole mini-batch's.

    ``None`` switches a term off, a number switches it on, 0.0 included. The coefficients that are on (``clip_low``,
    ``clip_high``, ``dual_clip``, ``behaviour_weight_cap``, ``nll_coeff``, ``entropy_coeff``, ``kl_coeff``,
    ``critic_coeff``, ``clip_value``) are float64 buffers, read at each forward: ``loss.clip_high = 0.3`` changes one in
    place, ``loss.kl_coeff = None`` and ``loss.kl_coeff = 0.1`` switch it, ``loss.clip_epsilon = 0.1`` sets both ranges.

    Args:
        actor_network: a module with ``get_dist(tensordict)``: one log-prob per step, composites summed.
        critic_network: writes ``state_value``; None = no critic loss.
        clip_epsilon: ε, or (ε_low, ε_high).
        importance: ``naive``, ``decoupled`` (reads ``prox_log_prob``), ``a3po`` (reads ``policy_age``), ``dis`` or
            ``m2po`` (``keep``, where it is, replaces its own choice within the input); see
            :func:`vapo_async.objectives.losses.policy_terms`.
        behaviour_weight_cap: bound of π_prox/π_behav with ``decoupled`` and ``a3po``.
        m2po_threshold: τ of ``m2po``.
        mismatch: ``none``, or ``tis``, ``icepop``, ``mis``, which read ``prox_log_prob``; see
            :func:`vapo_async.objectives.importance.mismatch_correction`.
        mismatch_low, mismatch_high: its range.
        dual_clip: c > 1 of dual-clip PPO.
        nll_coeff: μ of the positive-example loss, which reads ``correct``, bool [B] or [B, T].
        entropy_coeff: weight of the entropy bonus; estimated by one sample where the distribution has no closed form.
        kl_coeff: β of the KL to a reference policy, which reads ``ref_log_prob``.
        critic_coeff: weight of the critic's loss ½ (V − R)².
        clip_value: range of the value clipping, which reads the old ``state_value``.
        aggregation: of the policy's terms: ``token``, or ``sequence`` (needs [B, T]).
        reduction: ``mean`` divides by the denominators, ``sum`` by nothing; ``none`` gives every ``loss_*`` per step, 0
            outside the mask, undivided. Their sum over the tokens, for ``loss_nll`` over those of correct responses,
            is ``mean`` with ``aggregation="token"``; for ``sequence`` take each row's mean first, except for
            ``loss_nll`` and ``loss_critic``, which are means over tokens always.
        functional: True moves the parameters out of the networks, as TorchRL's losses do by default; it does not go
            with FSDP or DeepSpeed.
        device: of the buffers; None = that of the networks.

    Raises:
        ValueError: a name or number out of range, a missing key, another shape; on CPU also NaN or infinity in an
            entry under the mask, and a row without any step (on a GPU the host would wait for such checks).
        TypeError: a mask or ``correct`` is not boolean.

    Examples:
        >>> loss = VAPOLoss(actor, critic, importance="decoupled")
        >>> loss.make_value_estimator(gamma=1.0, alpha=0.05)
        >>> out = loss(batch)
        >>> sum(value for key, value in out.items() if key.startswith("loss_")).backward()
    """

    _AcceptedKeys = VAPOKeys
    default_keys = VAPOKeys
    default_value_estimator = LengthAdaptiveGAE
    age_edges: tuple[int, ...] = AGE_EDGES
    """Where the buckets of ``explained_variance_by_age`` begin, ascending; the first begins at 0."""
    length_edges: tuple[int, ...] = LENGTH_EDGES
    """The same of ``explained_variance_by_length``, in steps."""

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
        behaviour_weight_cap: Coefficient | None = 5.0,
        m2po_threshold: float = 0.04,
        mismatch: MismatchKind | str = MismatchKind.none,
        mismatch_low: float = 0.5,
        mismatch_high: float = 2.0,
        dual_clip: Coefficient | None = None,
        nll_coeff: Coefficient | None = 0.1,
        entropy_coeff: Coefficient | None = None,
        kl_coeff: Coefficient | None = None,
        critic_coeff: Coefficient | None = 1.0,
        clip_value: Coefficient | None = None,
        aggregation: LossAggregation | str = LossAggregation.token,
        reduction: str = "mean",
        functional: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be one of mean, sum, none, got {reduction!r}")
        self._functional = functional
        self._out_keys: list[str] | None = None
        super().__init__()
        self.critic_network = None
        for name, network in (("actor_network", actor_network), ("critic_network", critic_network)):
            check_network(name, network)
            if functional and network is not None:
                self.convert_to_functional(network, name)
            else:
                setattr(self, name, network)
                setattr(self, f"{name}_params", None)
        self._settings = PolicySettings(
            importance=kind_of("importance", importance, ImportanceKind),
            m2po_threshold=m2po_threshold,
            mismatch=kind_of("mismatch", mismatch, MismatchKind),
            mismatch_low=mismatch_low,
            mismatch_high=mismatch_high,
            aggregation=kind_of("aggregation", aggregation, LossAggregation),
        )
        self._register_coefficients(
            clip_epsilon,
            self._default_device if device is None else device,
            dual_clip=dual_clip,
            behaviour_weight_cap=behaviour_weight_cap,
            clip_value=clip_value,
            nll_coeff=nll_coeff,
            entropy_coeff=entropy_coeff,
            kl_coeff=kl_coeff,
            critic_coeff=critic_coeff,
        )
        self.reduction = reduction
        self.denominators: Denominators | None = None
        names = getattr(actor_network, "log_prob_keys", None)
        if names:
            samples = actor_network.dist_sample_keys
            several = len(names) > 1
            self.set_keys(
                sample_log_prob=list(names) if several else names[0], action=list(samples) if several else samples[0]
            )
        self.make_value_estimator()

    @property
    def functional(self) -> bool:
        return self._functional

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the loss reads, then its estimator for missing advantages; last ``keep``, optional, with ``m2po``."""
        names = ["action", "response_mask", *needed_names(self.settings)]
        keys = [*self.actor_network.in_keys, *keys_of(self.tensor_keys, names)]
        if self._critic is not None:
            keys += [*self._critic.in_keys, self.tensor_keys.value_target]
            keys += [] if self.clip_value is None else [self.tensor_keys.value]
        keep = [self.tensor_keys.keep] if self._settings.importance is ImportanceKind.m2po else []
        return list(dict.fromkeys([*keys, *self.value_estimator.in_keys, *keep]))

    @property
    def out_keys(self) -> list[str]:
        """The terms that are on, then the metrics, in the order of the output; ``select_out_keys`` leaves some out."""
        if self._out_keys is not None:
            return self._out_keys
        terms = {"loss_nll": self.nll_coeff, "loss_entropy": self.entropy_coeff, "loss_kl": self.kl_coeff}
        on = [name for name, coefficient in terms.items() if coefficient is not None]
        by_bucket = ["explained_variance_by_age", "explained_variance_by_length"]
        return [
            "loss_objective",
            *on,
            *([] if self._critic is None else ["loss_critic"]),
            *(name.removeprefix("loss_") for name in on),
            *("clip_low", "clip_high", "kl_behaviour", "ess", "kept_share"),
            *([] if self._critic is None else ["explained_variance", *by_bucket]),
        ]

    @out_keys.setter
    def out_keys(self, keys: list[str]) -> None:
        self._out_keys = keys

    @property
    def _critic(self) -> TensorDictModule | None:
        """The critic, if it is trained."""
        return None if self.critic_coeff is None else self.critic_network

    def set_keys(self, **kwargs: Key | None) -> None:
        """Names entries of the input: ``set_keys(advantage="a")``. None = its default; ``response_mask=None``: none."""
        super().set_keys(**kwargs)
        if "response_mask" in kwargs and kwargs["response_mask"] is None:
            self.tensor_keys.response_mask = None
            self._forward_value_estimator_keys()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        estimator = self._value_estimator
        if estimator is not None:
            known = vars(estimator.tensor_keys)
            changed = {name: key for name, key in vars(self.tensor_keys).items() if known.get(name, key) != key}
            estimator.set_keys(**changed)

    def make_value_estimator(
        self,
        value_type: ValueEstimatorBase | type[ValueEstimatorBase] | ValueEstimators | str | None = None,
        **hyperparams: Any,
    ) -> "VAPOLoss":
        """Chooses what computes missing advantages and value targets.

        Args:
            value_type: an estimator, its class, or the key or name that it is registered under with TorchRL
                (``ValueEstimators.GAE``, ``"gae"``); None = :class:`LengthAdaptiveGAE`, without a critic
                :class:`GroupRelativeAdvantage`.
            hyperparams: for the estimator; the critic is given to it.
        """
        if value_type is None:
            value_type = LengthAdaptiveGAE
            if self.critic_network is None:
                value_type = GroupRelativeAdvantage
        if isinstance(value_type, ValueEstimatorBase):
            if hyperparams:
                raise ValueError(f"an estimator that is made already takes no hyperparameters, got {list(hyperparams)}")
            estimator = value_type
        elif isinstance(value_type, ValueEstimators | str):
            estimator = build_value_estimator(self, value_type, **hyperparams)
        else:
            estimator = value_type.for_loss(self, **hyperparams)
        self._value_estimator = estimator
        self.value_type = type(estimator)
        self._forward_value_estimator_keys()
        return self

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and metrics of one (micro-)batch, see the class; the input is not changed."""
        tensordict = tensordict.copy()
        keys = self.tensor_keys
        if tensordict.get(keys.advantage, None) is None:
            self.value_estimator(tensordict, **self._estimator_params())
        with self._parameters_of("actor_network"):
            dist = distribution_of(self.actor_network, tensordict)
            # the mask comes first: nothing but steps under it is evaluated
            mask = step_mask(tensordict, dist.batch_shape, keys, self._loss_mask_keys())
            log_prob, entropy = log_prob_and_entropy(
                dist, tensordict, keys.action, mask, entropy=self.entropy_coeff is not None
            )
        inputs = StepInputs(tensordict, log_prob)
        batch = PolicyBatch.read(inputs, keys, self.settings, mask, entropy)
        denominators = UNDIVIDED
        if self.reduction == "mean":
            denominators = batch.denominators() if self.denominators is None else self.denominators
        losses, sums = batch.terms(None if self.reduction == "none" else denominators)
        metrics = policy_metrics(sums)
        if self._critic is not None and self.critic_coeff is not None:
            old_value = None if self.clip_value is None else inputs.required("value", keys.value, mask)
            target = inputs.required("value_target", keys.value_target, mask)
            with self._parameters_of("critic_network"):
                value = value_of(self._critic, tensordict, keys.value)
            steps = CriticSteps(at_least_float32(inputs.per_step(keys.value, value)), target, mask)
            loss, critic_metrics = steps.loss(old_value, self.clip_value, denominators, self.reduction)
            losses["loss_critic"] = self.critic_coeff * loss
            done = ("next", *(keys.done if isinstance(keys.done, tuple) else (keys.done,)))
            packed = None if mask.ndim == 1 else keys.segment_ids
            segments = None if packed is None else inputs.required("segment_ids", packed)
            metrics |= critic_metrics | steps.explained_variance(
                inputs.optional(keys.policy_age), inputs.optional(done), segments, self.age_edges, self.length_edges
            )
        out = losses | {name: value for name, value in metrics.items() if name not in losses}
        return TensorDict({name: out[name].to(log_prob.dtype) for name in self.out_keys})

    def _parameters_of(self, name: str) -> Any:
        """Puts a functional network's parameters in place for the time of a call."""
        if not self.functional:
            return nullcontext()
        return getattr(self, f"{name}_params").to_module(getattr(self, name), preserve_module_state=False)

    def _estimator_params(self) -> dict[str, Any]:
        if self.critic_network_params is None:
            return {}
        return {"params": self.critic_network_params.detach(), "target_params": self.target_critic_network_params}
