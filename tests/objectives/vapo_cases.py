"""Networks and batches for the tests of VAPOLoss, in float64."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import LossModule

from vapo_async.objectives import VAPOLoss

B, T, D, V = 6, 5, 4, 7
"""Rows, steps, features, actions."""
EXACT = {"rtol": 1e-12, "atol": 1e-12}
EVERYTHING = {"entropy_coeff": 0.01, "kl_coeff": 0.02, "clip_value": 0.3}
"""What switches on the terms that are off by default."""
METRICS = ["clip_low", "clip_high", "kl_behaviour", "ess", "kept_share"]
OF_CRITIC = ["explained_variance", "explained_variance_by_age", "explained_variance_by_length"]


def networks(seed: int = 0) -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    torch.manual_seed(seed)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(D, V).double(), in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="sample_log_prob",
        ),
    )
    return actor, TensorDictModule(nn.Linear(D, 1).double(), in_keys=["observation"], out_keys=["state_value"])


def vapo(seed: int = 0, **kwargs: Any) -> VAPOLoss:
    return VAPOLoss(*networks(seed), **kwargs)


def batch(padded: bool = False, ready: bool = False, seed: int = 1) -> TensorDict:
    """Rows of length T, or ``padded`` to it; ``ready``: with advantages and value targets, else to be estimated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (B, 1), generator=generator) if padded else torch.full((B, 1), T)
    mask = torch.arange(T) < lengths
    done = (torch.arange(T) == lengths - 1)[..., None]
    observation = draw(B, T + 1, D)
    data = TensorDict(
        {
            "observation": observation[:, :-1],
            "action": torch.randint(0, V, (B, T), generator=generator),
            "sample_log_prob": draw(B, T) * 0.2 - 2,
            "prox_log_prob": draw(B, T) * 0.2 - 2,
            "ref_log_prob": draw(B, T) * 0.2 - 2,
            "policy_age": torch.randint(0, 9, (B, T), generator=generator),
            "response_mask": mask,
            "correct": (draw(B, 1) > 0).expand(B, T),
            "next": {
                "observation": observation[:, 1:],
                "reward": draw(B, T, 1),
                "done": done,
                "terminated": done.clone(),
            },
        },
        [B, T],
    )
    if ready:
        for name in ("advantage", "value_target", "state_value"):
            data[name] = draw(B, T, 1)
    return data


def total(out: TensorDictBase) -> Tensor:
    return sum(value for key, value in out.items() if key.startswith("loss_"))


def gradients(loss: Tensor, module: LossModule) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
