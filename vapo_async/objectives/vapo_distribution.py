"""Log-probs and entropies, one number per step, of whatever distribution an actor has."""

from contextlib import AbstractContextManager, nullcontext

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules.distributions.utils import has_analytic_entropy, sample_and_log_prob

from vapo_async.objectives.checks import at_least_float32
from vapo_async.objectives.vapo_inputs import Key


def distribution_of(actor: TensorDictModule, tensordict: TensorDictBase) -> Distribution:
    """π_θ(·|s) of every step.

    A ``ProbabilisticTensorDictSequential`` (``ProbabilisticActor``) has its distribution built in float32 under
    autocast too, and with a network in bfloat16; another actor's ``get_dist`` is taken as it is.

    Raises ``ValueError`` where the distribution has several log-probs per step.
    """
    dist: Distribution
    if isinstance(actor, ProbabilisticTensorDictSequential) and not actor.return_composite:
        params = actor.get_dist_params(tensordict)
        last = [module for module in actor.modules() if isinstance(module, ProbabilisticTensorDictModule)][-1]
        device = next((x.device for x in params.values(True, True) if isinstance(x, Tensor)), torch.device("cpu"))
        with _no_autocast(device.type):
            dist = actor.build_dist_from_params(params.select(*last.in_keys, strict=False).apply(_exact))
    else:
        dist = actor.get_dist(tensordict)
    if len(dist.batch_shape) not in (1, 2):
        raise ValueError(
            f"expected one log-prob per step, [N] or [B, T], but the actor's have shape {list(dist.batch_shape)}: "
            "wrap its distribution in torch.distributions.Independent, or flatten the batch's leading dimensions"
        )
    return dist


def log_prob_and_entropy(
    dist: Distribution, tensordict: TensorDictBase, action: Key, mask: Tensor, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """log π_θ(a|s) and, if asked for, the entropy of every step: [N] or [B, T], with gradient, float32 at least.

    Both are evaluated in float32 under autocast too. Parts and features of a composite action are summed. Actions
    outside ``mask``, of the same shape, are never read: NaN or an action that does not exist may stand there.
    """
    keys = action if isinstance(action, list) else [action]
    actions = tensordict.select(*keys).apply(lambda x: _under(mask, x))
    with _no_autocast(mask.device.type):
        if isinstance(dist, CompositeDistribution):
            with set_composite_lp_aggregate(True):
                log_prob = dist.log_prob(actions)
        else:
            log_prob = dist.log_prob(actions.get(keys[0]))
        return at_least_float32(log_prob), entropy_of(dist) if entropy else None


def _under(mask: Tensor, action: Tensor) -> Tensor:
    """``action`` with the first one under the mask wherever the mask is False; no value is read on the host."""
    if action.shape[: mask.ndim] != mask.shape or not mask.numel():
        return action  # the distribution says what it expects; without any step there is nothing to replace
    first = action.flatten(0, mask.ndim - 1).index_select(0, mask.flatten().int().argmax(0, keepdim=True))
    return torch.where(mask.reshape(*mask.shape, *[1] * (action.ndim - mask.ndim)), action, first)


def entropy_of(dist: Distribution) -> Tensor:
    """The entropy of every step, [N] or [B, T], float32 at least, with its gradient.

    Exact where the distribution knows it, else −log π(x) of one sample x: reparametrised if the distribution can, else
    with the score function's gradient, −(1 + log π(x)) ∇ log π(x). Both are unbiased. Parts and features of a composite
    distribution are summed.
    """
    if isinstance(dist, CompositeDistribution):
        steps = len(dist.batch_shape)
        parts = [entropy_of(part) for part in dist.dists.values()]
        return torch.stack([part.reshape(*part.shape[:steps], -1).sum(-1) for part in parts]).sum(0)
    if has_analytic_entropy(dist):
        return at_least_float32(dist.entropy())
    _, log_prob = sample_and_log_prob(dist, reparameterize=dist.has_rsample)
    log_prob = at_least_float32(log_prob)
    constant = log_prob.detach()
    return -log_prob if dist.has_rsample else -log_prob - constant * (log_prob - constant)


def _no_autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _exact(x: Tensor) -> Tensor:
    """Halves as float32; masks and indices as they are."""
    return at_least_float32(x) if x.is_floating_point() else x
