"""VAPOLoss equals TorchRL's own losses where their settings coincide: values, and gradients of every parameter."""

from dataclasses import fields

import pytest
import torch
from conftest import REPOSITORY
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from torch import Tensor, nn
from torchrl.modules import NormalParamExtractor, TanhNormal
from torchrl.modules.distributions import LLMMaskedCategorical
from torchrl.objectives import ClipPPOLoss, ValueEstimators
from torchrl.objectives.llm import GRPOLoss
from torchrl.objectives.value import GAE
from vapo_cases import EXACT, B, D, T, V, batch, gradients, networks, total

from vapo_async.objectives import LengthAdaptiveGAE, VAPOLoss

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


def clip_ppo(*args: object, **kwargs: object) -> ClipPPOLoss:
    """ClipPPOLoss with its coefficients in float64, which it rounds to float32."""
    loss = ClipPPOLoss(*args, **kwargs)
    given = {"clip_epsilon": kwargs["clip_epsilon"]}
    if isinstance(kwargs["clip_epsilon"], tuple):
        given = dict(zip(("clip_epsilon_low", "clip_epsilon_high"), kwargs["clip_epsilon"], strict=True))
    for name in ("entropy_coeff", "critic_coeff", "clip_value", "max_importance_ratio"):
        if kwargs.get(name) is not None:
            given[name] = kwargs[name]
    for name, value in given.items():
        setattr(loss, name, torch.tensor(value, dtype=torch.float64))
    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("clip_value", [None, 0.3])
@pytest.mark.parametrize("epsilon", [0.2, (0.1, 0.28)])
def test_equals_clip_ppo(epsilon: float | tuple[float, float], clip_value: float | None, reduction: str) -> None:
    """TorchRL's ``l2`` is (V − R)², ours ½ (V − R)²: half its ``critic_coeff`` is the same loss."""
    actor, critic = networks()
    data = batch(ready=True)
    shared = {"clip_epsilon": epsilon, "entropy_coeff": 0.02, "clip_value": clip_value, "reduction": reduction}
    theirs = clip_ppo(actor, critic, critic_coeff=0.35, loss_critic_type="l2", functional=False, **shared)
    ours = VAPOLoss(actor, critic, critic_coeff=0.7, nll_coeff=None, **shared)
    expected, found = theirs(data), ours(data)
    for name in ("loss_objective", "loss_entropy", "loss_critic"):
        torch.testing.assert_close(found[name], expected[name].reshape(found[name].shape), **EXACT)
        got, want = gradients_of(actor, critic, found[name].sum(), expected[name].sum())
        torch.testing.assert_close(got, want, **EXACT)


def gradients_of(
    actor: nn.Module, critic: nn.Module, *losses: Tensor
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    parameters = [*actor.parameters(), *critic.parameters()]
    found, expected = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in losses)
    assert any(g is not None and bool(g.any()) for g in found)
    zeros = [torch.zeros_like(p) for p in parameters]
    return tuple(tuple(z if g is None else g for g, z in zip(grads, zeros, strict=True)) for grads in (found, expected))


def test_equals_clip_ppo_on_a_flat_batch() -> None:
    actor, critic = networks()
    data = batch(ready=True).reshape(-1)
    theirs = clip_ppo(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, loss_critic_type="l2", functional=False)
    ours = VAPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, critic_coeff=2.0, nll_coeff=None)
    ours.set_keys(response_mask=None)
    del data["response_mask"]
    got, want = gradients_of(actor, critic, total(ours(data)), total(theirs(data)))
    torch.testing.assert_close(total(ours(data)), total(theirs(data)), **EXACT)
    torch.testing.assert_close(got, want, **EXACT)


def test_equals_functional_clip_ppo_that_estimates_its_own_advantages() -> None:
    actor, critic = networks()
    data = batch()
    theirs = clip_ppo(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01, loss_critic_type="l2")
    ours = VAPOLoss(
        *networks(), clip_epsilon=0.2, entropy_coeff=0.01, critic_coeff=2.0, nll_coeff=None, functional=True
    )
    for loss in (theirs, ours):
        loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.8)
    expected, found = total(theirs(data)), total(ours(data))
    torch.testing.assert_close(found, expected, **EXACT)
    names = [name for name, _ in ours.named_parameters()]
    theirs_by_name = dict(theirs.named_parameters())
    want = torch.autograd.grad(expected, [theirs_by_name[name] for name in names])
    torch.testing.assert_close(gradients(found, ours), want, **EXACT)


@pytest.mark.parametrize("bound", [None, 100.0])
def test_decoupled_equals_clip_ppo_with_a_delayed_actor(bound: float | None) -> None:
    """PPO-EWMA of TorchRL holds π_prox as target parameters; here its log-probs are an entry. No weight is capped."""
    theirs, data = delayed_actor(moved=0.1, max_importance_ratio=bound)
    ours = VAPOLoss(
        *networks(),
        clip_epsilon=0.2,
        importance="decoupled",
        behaviour_weight_cap=bound,
        nll_coeff=None,
        functional=True,
    )
    expected, found = theirs(data)["loss_objective"], ours(data)["loss_objective"]
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(actor_gradients(found, ours), actor_gradients(expected, theirs), **EXACT)


def test_decoupled_cap_equals_max_importance_ratio_at_the_proximal_policy() -> None:
    """TorchRL bounds π_θ/π_behav, this loss π_prox/π_behav: one thing where π_θ = π_prox, in value and gradient."""
    theirs, data = delayed_actor(moved=0.0, max_importance_ratio=1.1)
    ours = VAPOLoss(
        *networks(), clip_epsilon=0.2, importance="decoupled", behaviour_weight_cap=1.1, nll_coeff=None, functional=True
    )
    weight = (data["prox_log_prob"] - data["sample_log_prob"]).exp()
    assert 0.2 < (weight > 1.1).double().mean() < 0.8
    expected, found = theirs(data)["loss_objective"], ours(data)["loss_objective"]
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(actor_gradients(found, ours), actor_gradients(expected, theirs), **EXACT)


def delayed_actor(moved: float, max_importance_ratio: float | None) -> tuple[ClipPPOLoss, TensorDict]:
    """A ClipPPOLoss whose proximal policy is ``moved`` away, and a batch with the proximal log-probs."""
    data = batch(ready=True)
    theirs = clip_ppo(
        *networks(),
        clip_epsilon=0.2,
        delay_actor=True,
        entropy_bonus=False,
        max_importance_ratio=max_importance_ratio,
    )
    theirs.target_actor_network_params.apply(lambda p: p.data.add_(moved * torch.randn_like(p)))
    with torch.no_grad(), theirs.target_actor_network_params.to_module(theirs.actor_network):
        data["prox_log_prob"] = theirs.actor_network.get_dist(data).log_prob(data["action"])
    return theirs, data


def actor_gradients(loss: Tensor, module: ClipPPOLoss | VAPOLoss) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(module.actor_network_params.parameters()), retain_graph=True)


@pytest.mark.parametrize("epsilon", [0.2, (0.1, 0.28)])
@pytest.mark.parametrize("ours_by, theirs_by", [("token", "token_mean"), ("sequence", "prompt_mean")])
def test_equals_grpo(ours_by: str, theirs_by: str, epsilon: float | tuple[float, float]) -> None:
    """GRPOLoss means its KL over padding too, which counts 0: times [B·T] / tokens it is the mean over tokens."""
    data = batch(padded=True, ready=True)
    mask = data["response_mask"]
    data["action"] = torch.where(mask, data["action"], -100)  # what GRPOLoss' distribution ignores
    data["correct"] = torch.ones(B, T, dtype=torch.bool)
    tokens = int(mask.sum())
    actor = LanguageModelActor()
    theirs = GRPOLoss(
        actor,
        clip_epsilon=epsilon,
        aggregation=theirs_by,
        entropy_coeff=0.02,
        kl_to_ref_coeff=0.3 * mask.numel() / tokens,
        masking_strategy="generic",
    ).double()
    low, high = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
    theirs.clip_epsilon_low, theirs.clip_epsilon_high = torch.tensor([low, high], dtype=torch.float64)
    theirs.set_keys(action="action", sample_log_prob="sample_log_prob", ref_log_probs="ref_log_prob")
    ours = VAPOLoss(actor, clip_epsilon=epsilon, aggregation=ours_by, entropy_coeff=0.02, kl_coeff=0.3, nll_coeff=None)
    expected, found = theirs(data), ours(data)
    names = {"loss_objective": "loss_objective", "loss_entropy": "loss_entropy"}
    if ours_by == "token":  # by sequences ours means each row's KL first, theirs does not
        names["loss_kl"] = "loss_kl_to_ref"
    for mine, other in names.items():
        want = getattr(expected, other).squeeze()
        torch.testing.assert_close(found[mine], want, **EXACT)
        torch.testing.assert_close(gradients(found[mine], ours), gradients(want, ours), **EXACT)


class LanguageModelActor(TensorDictModule):
    """Logits of every position, and the distribution that TorchRL's language-model wrappers build of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(D, V).double(), in_keys=["observation"], out_keys=["logits"])

    def get_dist(self, tensordict: TensorDict, **_: object) -> LLMMaskedCategorical:
        return LLMMaskedCategorical(self(tensordict.copy())["logits"], tensordict["response_mask"])


@pytest.mark.parametrize("flat", [False, True])
def test_equals_clip_ppo_with_several_continuous_actions(flat: bool) -> None:
    torch.manual_seed(0)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(
            nn.Sequential(nn.Linear(D, 6).double(), NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=True,
            log_prob_key="sample_log_prob",
        ),
    )
    data = batch(ready=True)
    data = actor(data)
    data["sample_log_prob"] = data["sample_log_prob"].detach() + 0.3 * torch.randn(B, T, dtype=torch.float64)
    data["action"] = data["action"].detach()
    data = data.exclude("loc", "scale")
    data = data.reshape(-1) if flat else data
    theirs = clip_ppo(actor, None, clip_epsilon=0.2, critic_coeff=0.0, entropy_bonus=False, functional=False)
    ours = VAPOLoss(actor, clip_epsilon=0.2, nll_coeff=None)
    found, expected = ours(data)["loss_objective"], theirs(data)["loss_objective"]
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients(found, ours), gradients(expected, ours), **EXACT)


def test_equals_clip_ppo_with_a_composite_action() -> None:
    with set_composite_lp_aggregate(False):
        torch.manual_seed(0)
        actor = ProbabilisticTensorDictSequential(
            TensorDictSequential(
                TensorDictModule(
                    nn.Linear(D, V).double(), in_keys=["observation"], out_keys=[("params", "turn", "logits")]
                ),
                TensorDictModule(
                    nn.Sequential(nn.Linear(D, 4).double(), NormalParamExtractor()),
                    in_keys=["observation"],
                    out_keys=[("params", "push", "loc"), ("params", "push", "scale")],
                ),
            ),
            ProbabilisticTensorDictModule(
                in_keys=["params"],
                out_keys=["turn", "push"],
                distribution_class=CompositeDistribution,
                distribution_kwargs={
                    "distribution_map": {"turn": torch.distributions.Categorical, "push": torch.distributions.Normal}
                },
                return_log_prob=True,
            ),
        )
        data = actor(batch(ready=True)).detach().exclude("params")
        for key in ("turn_log_prob", "push_log_prob"):
            data[key] = data[key] + 0.1 * torch.randn_like(data[key])
        theirs = clip_ppo(actor, None, clip_epsilon=0.2, critic_coeff=0.0, entropy_coeff=0.05, functional=False)
        ours = VAPOLoss(actor, clip_epsilon=0.2, nll_coeff=None, entropy_coeff=0.05)
        assert ours.tensor_keys.sample_log_prob == ["turn_log_prob", "push_log_prob"]
        found, expected = ours(data), theirs(data)
        for name in ("loss_objective", "loss_entropy"):
            torch.testing.assert_close(found[name], expected[name], **EXACT)
            want = gradients(expected[name], ours)
            torch.testing.assert_close(gradients(found[name], ours), want, **EXACT)


def test_metrics_of_clip_ppo() -> None:
    """On a flat batch, where TorchRL's effective sample size is over all steps."""
    actor, critic = networks()
    data = batch(ready=True).reshape(-1)
    expected = clip_ppo(actor, critic, clip_epsilon=0.2, functional=False)(data)
    found = VAPOLoss(actor, critic, clip_epsilon=0.2, entropy_coeff=0.01)(data)
    torch.testing.assert_close(found["ess"], expected["ESS"], **EXACT)
    torch.testing.assert_close(found["entropy"], expected["entropy"], **EXACT)
    torch.testing.assert_close(found["explained_variance"], expected["explained_variance"].squeeze(), **EXACT)
    assert 0 < found["clip_low"] + found["clip_high"] < expected["clip_fraction"]
    assert found["kl_behaviour"] > 0


def test_parameters_stay_in_their_modules() -> None:
    actor, critic = networks()
    loss = VAPOLoss(actor, critic)
    assert {id(p) for p in loss.parameters()} == {id(p) for net in (actor, critic) for p in net.parameters()}


@pytest.mark.parametrize("lmbda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_estimator_equals_gae(lmbda: float, truncated: bool) -> None:
    _, critic = networks()
    data = batch()
    if truncated:
        data["next", "terminated"] = torch.zeros(B, T, 1, dtype=torch.bool)
    gamma64, lmbda64 = torch.tensor([0.9, lmbda], dtype=torch.float64)
    expected = GAE(gamma=gamma64, lmbda=lmbda64, value_network=critic, vectorized=False)(data.clone())
    found = LengthAdaptiveGAE(0.9, lmbda=lmbda, lmbda_critic=lmbda, value_network=critic)(data.clone())
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(found[key], expected[key], **EXACT)


def test_clip_ppo_takes_the_estimator_by_name() -> None:
    actor, critic = networks()
    loss = clip_ppo(actor, critic, clip_epsilon=0.2, functional=False)
    loss.make_value_estimator("length_adaptive_gae", alpha=0.5)
    found = loss(batch(padded=True).exclude("advantage"))
    ready = LengthAdaptiveGAE(alpha=0.5, value_network=critic)(batch(padded=True))
    torch.testing.assert_close(found["loss_objective"], loss(ready)["loss_objective"], **EXACT)


def test_jagged_entries_are_a_flat_batch() -> None:
    _, critic = networks()
    data = batch(padded=True)
    lengths = data["response_mask"].sum(1).tolist()
    names = ["observation", "action", "sample_log_prob", "correct", "response_mask"]
    names += [("next", name) for name in ("observation", "reward", "done", "terminated")]
    jagged = TensorDict(batch_size=[B])
    for name in names:
        rows = [data[name][b, :n].contiguous() for b, n in enumerate(lengths)]
        jagged[name] = torch.nested.nested_tensor(rows, layout=torch.jagged)
    estimator = LengthAdaptiveGAE(alpha=0.5, value_network=critic)
    flat = TensorDict({key: x.values() for key, x in estimator(jagged).items(True, True)}, [sum(lengths)])
    loss = VAPOLoss(*networks())
    torch.testing.assert_close(total(loss(flat)), total(loss(estimator(data))), **EXACT)


PAGE = (REPOSITORY / "docs" / "torchrl.md").read_text()


@pytest.mark.parametrize("column", [1, 2])
def test_both_columns_of_the_page_run(column: int) -> None:
    table = PAGE.split("## Line by line")[1].split("\n\n")[1]
    cells = [line.split("|")[column].strip() for line in table.splitlines()[2:]]
    actor, critic = networks()
    scope = {"actor": actor, "critic": critic, "rollout": batch()}
    code = [cell.strip("`") for cell in cells if cell]
    assert len(code) == 8 + 2 * (column - 1)
    exec("\n".join(code), scope)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scope["loss"].parameters())


def test_the_page_names_every_key_and_coefficient() -> None:
    keys = {field.name for field in fields(VAPOLoss._AcceptedKeys)}
    for name in keys | set(VAPOLoss._schedulable_buffers) | set(VAPOLoss(*networks()).out_keys):
        assert f"`{name}`" in PAGE, name
