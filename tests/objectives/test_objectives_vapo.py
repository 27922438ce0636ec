"""VAPOLoss and LengthAdaptiveGAE beside TorchRL's ClipPPOLoss and GAE."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from torchrl.objectives.value import GAE

from vapo_async.objectives import LengthAdaptiveGAE, VAPOLoss
from vapo_async.objectives.losses import denominators_of

torch.set_num_threads(1)
B, T, D, V = 6, 5, 4, 7


def networks() -> tuple[ProbabilisticTensorDictSequential, TensorDictModule]:
    torch.manual_seed(0)
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


def batch(padded: bool = False) -> TensorDict:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (B, 1), generator=generator) if padded else torch.full((B, 1), T)
    mask = torch.arange(T) < lengths
    done = (torch.arange(T) == lengths - 1)[..., None]
    observation = draw(B, T + 1, D)
    return TensorDict(
        {
            "observation": observation[:, :-1],
            "action": torch.randint(0, V, (B, T), generator=generator),
            "sample_log_prob": draw(B, T) * 0.2 - 2,
            "prox_log_prob": draw(B, T) * 0.2 - 2,
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


@pytest.mark.parametrize("lmbda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_estimator_equals_torchrl_gae(lmbda: float, truncated: bool) -> None:
    _, critic = networks()
    data = batch()
    if truncated:
        data["next", "terminated"] = torch.zeros(B, T, 1, dtype=torch.bool)
    gamma64, lmbda64 = torch.tensor([0.9, lmbda], dtype=torch.float64)
    theirs = GAE(gamma=gamma64, lmbda=lmbda64, value_network=critic, vectorized=False)(data.clone())
    ours = LengthAdaptiveGAE(0.9, lmbda=lmbda, lmbda_critic=lmbda, value_network=critic)
    found = ours(data.clone())
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(found[key], theirs[key], rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.value_estimate(data.clone()), theirs["value_target"], rtol=0, atol=1e-10)
    values = theirs.exclude("advantage", "value_target")
    without = LengthAdaptiveGAE(0.9, lmbda=lmbda, lmbda_critic=lmbda)(values)
    torch.testing.assert_close(without["advantage"], theirs["advantage"], rtol=0, atol=1e-10)


def test_estimator_takes_each_rows_own_lambda() -> None:
    _, critic = networks()
    data = batch(padded=True)
    found = LengthAdaptiveGAE(1.0, alpha=0.5, value_network=critic)(data.clone())
    lengths = data["response_mask"].sum(1)
    for b, n in enumerate(lengths.tolist()):
        lmbda = torch.tensor(max(0.0, 1 - 1 / (0.5 * n)), dtype=torch.float64)
        row = GAE(gamma=torch.tensor(1.0).double(), lmbda=lmbda, value_network=critic, vectorized=False)(
            data[b : b + 1, :n]
        )
        torch.testing.assert_close(found["advantage"][b, :n], row["advantage"][0], rtol=0, atol=1e-10)
        reward_to_go = data["next", "reward"][b, :n].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(found["value_target"][b, :n], reward_to_go, rtol=0, atol=1e-10)
        assert not found["advantage"][b, n:].any()


def test_estimator_refuses_what_it_cannot_read() -> None:
    _, critic = networks()
    data = batch(padded=True)
    estimator = LengthAdaptiveGAE(value_network=critic)
    with pytest.raises(ValueError, match="response_mask"):
        estimator(data.clone().exclude("response_mask"))
    data["response_mask"] = torch.ones(B, T, dtype=torch.bool)
    with pytest.raises(ValueError, match="goes on after 'done'"):
        estimator(data.clone())
    with pytest.raises(ValueError, match=r"\[B, T, 1\]"):
        LengthAdaptiveGAE()(data)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("epsilon", [0.2, (0.2, 0.28)])
def test_equals_clip_ppo_at_ppo_settings(functional: bool, epsilon: float | tuple[float, float]) -> None:
    actor, critic = networks()
    data = LengthAdaptiveGAE(0.99, lmbda=0.95, lmbda_critic=0.95, value_network=critic)(batch())
    theirs = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=epsilon,
        entropy_coeff=0.02,
        critic_coeff=0.5,
        loss_critic_type="l2",
        functional=False,
    )
    losses = theirs(data)
    parameters = [*actor.parameters(), *critic.parameters()]
    names = ("loss_objective", "loss_entropy", "loss_critic")
    expected = torch.autograd.grad(sum(losses[n] for n in names), parameters)
    ours = VAPOLoss(actor, critic, clip_epsilon=epsilon, nll_coeff=0.0, entropy_coeff=0.02, functional=functional)
    found = ours(data)
    for name in names:
        torch.testing.assert_close(found[name], losses[name], rtol=0, atol=1e-7)
    if not functional:
        got = torch.autograd.grad(sum(found[n] for n in names), parameters)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)
    else:
        sum(found[n] for n in names).backward()
        grads = sorted(p.grad.norm().item() for p in ours.parameters())
        assert grads == pytest.approx(sorted(g.norm().item() for g in expected), abs=1e-7)


def test_decoupled_with_prox_at_behaviour_is_naive() -> None:
    actor, critic = networks()
    data = LengthAdaptiveGAE(value_network=critic)(batch(padded=True))
    data["prox_log_prob"] = data["sample_log_prob"]
    found = [VAPOLoss(actor, critic, importance=kind)(data) for kind in ("naive", "decoupled")]
    torch.testing.assert_close(found[0]["loss_objective"], found[1]["loss_objective"], rtol=0, atol=1e-12)


def test_decoupled_equals_ppo_ewma_of_torchrl() -> None:
    """TorchRL's delayed actor is the same objective where no weight is capped."""
    actor, critic = networks()
    data = LengthAdaptiveGAE(value_network=critic)(batch())
    theirs = ClipPPOLoss(actor, critic, clip_epsilon=0.2, delay_actor=True, entropy_bonus=False)
    with torch.no_grad():
        prox = actor.get_dist(data).log_prob(data["action"])
        theirs.target_actor_network_params.apply(lambda p: p.data.add_(0.1))
        with theirs.target_actor_network_params.to_module(theirs.actor_network):
            prox = theirs.actor_network.get_dist(data).log_prob(data["action"])
    actor, critic = networks()
    ours = VAPOLoss(actor, critic, clip_epsilon=0.2, importance="decoupled", behaviour_weight_cap=None, nll_coeff=0.0)
    expected = theirs(data)["loss_objective"]
    found = ours(data.set("prox_log_prob", prox))["loss_objective"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_computes_missing_advantages_and_lists_its_keys() -> None:
    actor, critic = networks()
    data = batch(padded=True)
    loss = VAPOLoss(actor, critic, entropy_coeff=0.01)
    loss.make_value_estimator(gamma=1.0, alpha=0.5)
    out = loss(data)
    ready = LengthAdaptiveGAE(1.0, alpha=0.5, value_network=critic)(data.clone())
    torch.testing.assert_close(out["loss_objective"], loss(ready)["loss_objective"])
    out_keys = set(out.keys())
    assert out_keys == set(loss.out_keys)
    assert {"response_mask", "correct", "sample_log_prob", "action", "advantage"} <= set(loss.in_keys)
    sum(out[k] for k in out_keys if k.startswith("loss_")).backward()
    assert all(p.grad is not None for p in loss.parameters())
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.9)
    assert isinstance(loss.value_estimator, GAE) and not isinstance(loss.value_estimator, LengthAdaptiveGAE)


def test_keys_can_be_renamed() -> None:
    actor, critic = networks()
    data = LengthAdaptiveGAE(value_network=critic)(batch(padded=True))
    loss = VAPOLoss(actor, critic)
    expected = loss(data)
    loss.set_keys(response_mask="m", advantage="a", correct="c")
    renamed = data.rename_key_("response_mask", "m").rename_key_("advantage", "a").rename_key_("correct", "c")
    torch.testing.assert_close(loss(renamed)["loss_objective"], expected["loss_objective"])
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        loss.set_keys(nonsense="x")


def test_called_with_keyword_arguments() -> None:
    actor, critic = networks()
    data = LengthAdaptiveGAE(value_network=critic)(batch(padded=True))
    loss = VAPOLoss(actor, critic)
    keywords = {key: data[key] for key in loss.in_keys}
    expected = loss(data)
    found = loss(**keywords)
    for key, value in zip(loss.out_keys, found, strict=True):
        torch.testing.assert_close(value, expected[key])


def test_micro_batches_add_up_with_global_denominators() -> None:
    actor, critic = networks()
    data = LengthAdaptiveGAE(value_network=critic)(batch(padded=True))
    loss = VAPOLoss(actor, critic, nll_coeff=0.3, entropy_coeff=0.01)
    names = [n for n in loss.out_keys if n.startswith("loss_")]
    whole = loss(data)
    loss.denominators = denominators_of(data["response_mask"], data["correct"][:, 0])
    parts = [loss(data[a:b]) for a, b in ((0, 1), (1, 4), (4, B))]
    for name in names:
        torch.testing.assert_close(sum(p[name] for p in parts), whole[name], rtol=0, atol=1e-6)
    one = torch.autograd.grad(sum(whole[n] for n in names), list(loss.parameters()))
    many = torch.autograd.grad(sum(p[n] for p in parts for n in names), list(loss.parameters()))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-6)
