"""What VAPOLoss has per step: log-probs and entropies of all distributions, and the metrics over them."""

import math
import types
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torchrl.modules import TanhNormal
from vapo_cases import EVERYTHING, B, D, T, V, batch, networks, total

from vapo_async.objectives import VAPOLoss
from vapo_async.objectives.statistics import bucket_of, explained_variance
from vapo_async.objectives.vapo_distribution import entropy_of
from vapo_async.objectives.vapo_metrics import CriticSteps

torch.set_num_threads(1)


# Distributions


def actor_of(distribution: type, parameters: dict[str, nn.Module], **kwargs: Any) -> ProbabilisticTensorDictSequential:
    modules = [TensorDictModule(net, in_keys=["observation"], out_keys=[name]) for name, net in parameters.items()]
    head = ProbabilisticTensorDictModule(
        in_keys=list(parameters),
        out_keys=["action"],
        distribution_class=distribution,
        distribution_kwargs=kwargs,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )
    return ProbabilisticTensorDictSequential(*modules, head)


def test_entropy_without_a_closed_form_is_sampled() -> None:
    """TanhNormal's entropy and its gradient, against numerical integration."""
    loc = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    z = loc + scale * x
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    log_prob = (
        -0.5 * x**2 - 0.5 * math.log(2 * math.pi) - scale.log() - 2 * (math.log(2) - z - nn.functional.softplus(-2 * z))
    )
    exact = -(density * log_prob).sum() * (x[1] - x[0])
    expected = torch.autograd.grad(exact, [loc, scale])
    torch.manual_seed(0)
    n = 200_000
    found = entropy_of(TanhNormal(loc.expand(n, 1), scale.expand(n, 1)))
    assert found.shape == (n,)
    assert float(found.mean()) == pytest.approx(float(exact), abs=0.01)
    for got, want in zip(torch.autograd.grad(found.mean(), [loc, scale]), expected, strict=True):
        assert float(got) == pytest.approx(float(want), abs=0.01)


class Unknown(torch.distributions.Distribution):
    """A categorical distribution that knows neither its entropy nor how to reparametrise."""

    arg_constraints = types.MappingProxyType({})

    def __init__(self, logits: Tensor) -> None:
        self.inner = torch.distributions.Categorical(logits=logits)
        super().__init__(logits.shape[:-1])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.inner.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.inner.log_prob(value)


def test_entropy_of_discrete_samples_has_the_right_gradient() -> None:
    logits = torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    found = entropy_of(Unknown(logits.expand(200_000, 3))).mean()
    exact = torch.distributions.Categorical(logits=logits).entropy()
    assert float(found) == pytest.approx(float(exact), abs=0.01)
    (got,), (want,) = torch.autograd.grad(found, logits), torch.autograd.grad(exact, logits)
    torch.testing.assert_close(got, want, rtol=0, atol=0.01)
    composite = CompositeDistribution.from_distributions(
        TensorDict(batch_size=[4]),
        {
            "a": torch.distributions.Normal(torch.zeros(4, 2), 1.0),
            "b": torch.distributions.Categorical(torch.ones(4, 3)),
        },
    )
    normal = 0.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(entropy_of(composite), torch.full((4,), 2 * normal + math.log(3)))


def test_several_log_probs_per_step_are_refused() -> None:
    actor = actor_of(torch.distributions.Normal, {"loc": nn.Linear(D, 2).double()}, scale=1.0)
    data = batch(ready=True).set("action", torch.zeros(B, T, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"one log-prob per step.*\[6, 5, 2\].*Independent"):
        VAPOLoss(actor, nll_coeff=None)(data)


class Half(nn.Module):
    """Logits in bfloat16, as a network under autocast gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, V)

    def forward(self, observation: Tensor) -> Tensor:
        return self.linear(observation)


@pytest.mark.parametrize("autocast", [False, True])
def test_log_probs_of_half_logits_are_computed_in_float32(autocast: bool) -> None:
    torch.manual_seed(0)
    net = Half() if autocast else Half().bfloat16()
    actor = actor_of(torch.distributions.Categorical, {"logits": net})
    critic = TensorDictModule(nn.Linear(D, 1), in_keys=["observation"], out_keys=["state_value"])
    critic = critic if autocast else critic.bfloat16()
    data = batch(ready=True).apply(lambda x: x.float() if x.is_floating_point() else x)
    data["observation"] = data["observation"] if autocast else data["observation"].bfloat16()
    loss = VAPOLoss(actor, critic, nll_coeff=1.0, entropy_coeff=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = loss(data)
        logits = net(data["observation"])
    assert logits.dtype == torch.bfloat16
    exact = logits.double().log_softmax(-1)
    chosen = exact.gather(-1, data["action"][..., None]).squeeze(-1)
    correct = data["correct"]
    assert {out[key].dtype for key in loss.out_keys} == {torch.float32}
    assert float(out["nll"]) == pytest.approx(-float(chosen[correct].mean()), abs=1e-6)
    assert float(out["entropy"]) == pytest.approx(-float((exact.exp() * exact).sum(-1).mean()), abs=1e-6)
    total(out).backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in loss.parameters())


def test_distributions_are_evaluated_outside_autocast() -> None:
    """This one multiplies matrices, which autocast would do in bfloat16."""
    torch.manual_seed(0)
    factor, net = torch.randn(3, 2), nn.Linear(D, 3)
    actor = actor_of(
        torch.distributions.LowRankMultivariateNormal, {"loc": net}, cov_factor=factor, cov_diag=torch.ones(3)
    )
    data = batch(ready=True).apply(lambda x: x.float() if x.is_floating_point() else x)
    data["action"] = torch.randn(B, T, 3)
    data["correct"] = torch.ones(B, T, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = VAPOLoss(actor)(data)["nll"]
        loc = net(data["observation"])
    covariance = factor.double() @ factor.double().T + torch.eye(3)
    exact = torch.distributions.MultivariateNormal(loc.double(), covariance)
    assert float(nll) == pytest.approx(-float(exact.log_prob(data["action"].double()).mean()), abs=1e-5)


# Metrics


def test_metrics_of_a_batch_computed_by_hand() -> None:
    """Four steps, uniform policy over two actions: log π = −ln 2, ratios 2, 1/2, 1 and 1."""
    actor = actor_of(torch.distributions.Categorical, {"logits": Zeros()})
    critic = TensorDictModule(lambda x: x[..., :1], in_keys=["observation"], out_keys=["state_value"])
    data = TensorDict(
        {
            "observation": torch.tensor([[1.0], [2.0], [3.0], [5.0]]).double(),
            "action": torch.zeros(4, dtype=torch.int64),
            "sample_log_prob": torch.tensor([0.25, 1.0, 0.5, 0.5]).double().log(),
            "advantage": torch.tensor([1.0, -1.0, 1.0, 1.0]).double(),
            "value_target": torch.tensor([1.0, 3.0, 2.0, 6.0]).double(),
            "policy_age": torch.tensor([0, 0, 1, 9]),
            "response_mask": torch.ones(4, dtype=torch.bool),
        },
        [4],
    )
    out = VAPOLoss(actor, critic, nll_coeff=None)(data)
    assert float(out["clip_low"]) == float(out["clip_high"]) == 0.25
    assert float(out["ess"]) == pytest.approx(4.5**2 / (4 * 6.25))
    ratios = [2, 0.5, 1, 1]
    assert float(out["kl_behaviour"]) == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4)
    assert float(out["loss_objective"]) == pytest.approx((-1.28 + 0.8 - 1 - 1) / 4)
    assert float(out["kept_share"]) == 1
    errors, targets = torch.tensor([0.0, 1, -1, 1]), torch.tensor([1.0, 3, 2, 6])
    assert float(out["explained_variance"]) == pytest.approx(1 - float(errors.var() / targets.var()))
    by_age = out["explained_variance_by_age"]
    assert by_age[0] == pytest.approx(1 - 0.25 / 1)  # steps 0 and 1: errors 0, 1; targets 1, 3
    assert by_age[1] == 0 and by_age[4] == 0 and by_age[2:4].isnan().all()
    assert out["explained_variance_by_length"].isnan().all()  # flat steps may stand in any order


class Zeros(nn.Module):
    """Two logits that are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, observation: Tensor) -> Tensor:
        return self.logits.expand(*observation.shape[:-1], 2)


@pytest.mark.parametrize("by", ["done", "segment_ids", "both"])
def test_lengths_are_of_trajectories(by: str) -> None:
    """Rows of 100 steps that hold two responses of 30 and 70: below 64, and from 64 on."""
    value, target = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    steps = CriticSteps(value, target, torch.ones(3, 100, dtype=torch.bool))
    ends = (torch.arange(100) == 29).expand(3, 100)
    segments = (torch.arange(100) >= 30).long().expand(3, 100)
    done, segment_ids = (None if by == "segment_ids" else ends), (None if by == "done" else segments)
    found = steps.explained_variance(None, done, segment_ids)["explained_variance_by_length"]
    for i, part in enumerate((slice(0, 30), slice(30, 100))):
        mask = torch.ones_like(value[:, part], dtype=torch.bool)
        torch.testing.assert_close(found[i], explained_variance(value[:, part], target[:, part], mask))
    assert found[2:].isnan().all()
    whole = steps.explained_variance(None, None, None)["explained_variance_by_length"]
    assert torch.equal(whole.isnan(), torch.tensor([True, False, True, True, True, True]))


def test_bucket_edges() -> None:
    loss = VAPOLoss(networks()[0])
    ages = torch.tensor([0, 1, 2, 3, 4, 7, 8, 50])
    assert bucket_of(ages, loss.age_edges).tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    lengths = torch.tensor([1, 63, 64, 255, 256, 1024, 4096, 16383, 16384])
    assert bucket_of(lengths, loss.length_edges).tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5]


def test_no_value_is_read_on_the_host() -> None:
    """On the meta device there are no values: whatever would wait for a GPU raises."""
    actor = actor_of(torch.distributions.Categorical, {"logits": nn.Linear(D, V).double()}, validate_args=False)
    kwargs = {"importance": "decoupled", "mismatch": "icepop", "dual_clip": 3.0, **EVERYTHING}
    loss = VAPOLoss(actor, networks()[1], **kwargs).to("meta")
    out = loss(batch(padded=True, ready=True).to("meta"))
    assert {value.device.type for value in out.values()} == {"meta"}
    total(out).backward()
    with pytest.raises(RuntimeError, match="item"):
        float(out["ess"])
