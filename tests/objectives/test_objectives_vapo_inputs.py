"""What VAPOLoss makes of unusual input: padding of any kind, stale entries, flat steps, coefficients that change."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, TanhNormal
from vapo_cases import EXACT, B, D, T, batch, gradients, networks, total, vapo

from vapo_async.config.algorithm import ImportanceKind
from vapo_async.objectives import VAPOLoss
from vapo_async.objectives.losses import denominators_of
from vapo_async.objectives.settings import PolicySettings

torch.set_num_threads(1)


def continuous() -> ProbabilisticTensorDictSequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 4), NormalParamExtractor()).double()
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=True,
            log_prob_key="sample_log_prob",
        ),
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind, fill", [("discrete", -100), ("continuous", math.nan), ("continuous", 5.0)])
def test_actions_outside_the_mask_are_not_read(kind: str, fill: float, flat: bool) -> None:
    data = batch(padded=True, ready=True)
    actor, critic = networks()
    if kind == "continuous":
        actor = continuous()
        data["action"] = torch.rand(B, T, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
    data = data.reshape(-1) if flat else data
    loss = VAPOLoss(actor, critic)
    expected = loss(data)
    wanted = gradients(total(expected), loss)
    assert all(g.isfinite().all() for g in wanted)
    data["action"][~data["response_mask"]] = fill
    found = loss(data)
    torch.testing.assert_close(total(found), total(expected), **EXACT)
    torch.testing.assert_close(gradients(total(found), loss), wanted, **EXACT)


def test_a_stale_value_is_not_the_critics() -> None:
    actor, _ = networks()
    critic = TensorDictModule(nn.Linear(D, 1).double(), in_keys=["observation"], out_keys=["v"])
    loss, data = VAPOLoss(actor, critic), batch(ready=True)
    assert "state_value" in data
    with pytest.raises(ValueError, match=r"the critic writes \['v'\], not 'state_value': set_keys\(value=\.\.\.\)"):
        loss(data)
    loss.set_keys(value="v")
    loss(data)["loss_critic"].backward()
    assert all(p.grad.abs().sum() > 0 for p in critic.parameters())


def test_flat_steps_have_no_known_lengths() -> None:
    data, loss = batch(ready=True).reshape(-1), vapo()
    loss.set_keys(segment_ids="segment_ids")
    data["segment_ids"] = torch.zeros(B * T, dtype=torch.int64)
    out = loss(data)
    assert out["explained_variance_by_length"].isnan().all() and out["explained_variance_by_age"].isfinite().any()


def test_edges_are_those_of_the_loss() -> None:
    loss = vapo()
    loss.age_edges, loss.length_edges = (3,), (2, T)
    out = loss(batch(ready=True))
    assert out["explained_variance_by_age"].shape == (2,)
    assert out["explained_variance_by_length"].isnan().tolist() == [True, True, False]


def test_keep_survives_a_selection_of_the_input_keys() -> None:
    loss, data = vapo(importance="m2po", nll_coeff=None), batch(ready=True)
    none = data.clone().set("keep", torch.zeros(B, T, dtype=torch.bool))
    assert float(loss(none.select(*loss.in_keys))["kept_share"]) == 0
    names = {"_".join(k) if isinstance(k, tuple) else k: data[k] for k in loss.in_keys if k != "keep"}
    torch.testing.assert_close(loss(**names)[0], loss(data)["loss_objective"])


def test_negative_ages_are_named() -> None:
    loss, data = vapo(importance="a3po"), batch(padded=True, ready=True)
    data["policy_age"][~data["response_mask"]] = -1
    assert total(loss(data)).isfinite()
    data["policy_age"][2, 0] = -1
    with pytest.raises(ValueError, match="'policy_age' is negative on steps that count, in row 2 of 6"):
        loss(data)


@pytest.mark.parametrize("importance", ["dis", "m2po"])
def test_dual_clip_needs_a_clip(importance: str) -> None:
    message = f"dual_clip must be None with importance '{importance}'"
    with pytest.raises(ValueError, match=message):
        PolicySettings(importance=ImportanceKind(importance), dual_clip=3.0)
    with pytest.raises(ValueError, match=message):
        vapo(importance=importance, dual_clip=3.0)(batch(ready=True))


def test_coefficients_are_switched_and_checked_by_assignment() -> None:
    loss, data = vapo(), batch(ready=True)
    assert "entropy_coeff" not in loss.state_dict()
    loss.entropy_coeff = 0.1
    assert float(loss.state_dict()["entropy_coeff"]) == 0.1 and "loss_entropy" in loss(data)
    loss.entropy_coeff = None
    assert "entropy_coeff" not in loss.state_dict() and "loss_entropy" not in loss(data)
    loss.entropy_coeff = 0.2
    loss.critic_coeff = torch.tensor(2.0)
    assert loss.entropy_coeff.dtype == loss.critic_coeff.dtype == torch.float64
    loss.clip_epsilon = 0.1
    assert float(loss.clip_low) == float(loss.clip_high) == 0.1 == float(loss.clip_epsilon[1])
    loss.clip_epsilon = (0.2, 0.3)
    assert (float(loss.clip_low), float(loss.clip_high)) == (0.2, 0.3)
    bad: list[tuple[str, Any, str]] = [
        ("entropy_coeff", -5.0, "entropy_coeff must be at least 0"),
        ("clip_low", 3.0, "clip_low must be at least 0 and below 1, got 3"),
        ("clip_high", None, "clip_high must be a number at least 0, got None"),
        ("dual_clip", 0.5, "dual_clip must be above 1"),
        ("kl_coeff", "0.1", "kl_coeff must be a number .*got '0.1'"),
        ("clip_epsilon", "0.2", "clip_epsilon must be one number .*got '0.2'"),
        ("entropy_coeff", torch.ones(2), r"entropy_coeff must be a number .*got a tensor of shape \[2\]"),
    ]
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    for name, value, message in bad:
        with pytest.raises(ValueError, match=message):
            setattr(loss, name, value)
    torch.testing.assert_close(dict(loss.state_dict()), before, equal_nan=True)
    loss.to_empty(device="cpu", recurse=False)


def test_what_is_no_network_or_mask_or_count_is_named() -> None:
    actor, critic = networks()
    with pytest.raises(ValueError, match="actor_network has no in_keys, out_keys, get_dist, got Linear"):
        VAPOLoss(nn.Linear(D, 1), critic)
    with pytest.raises(ValueError, match="critic_network has no in_keys, out_keys, got Linear"):
        VAPOLoss(actor, nn.Linear(D, 1))
    loss, data = vapo(), batch(ready=True)
    with pytest.raises(TypeError, match=r"collector.*to be boolean, got dtype torch.float32"):
        loss(data.copy().set(("collector", "mask"), torch.ones(B, T, 1)))
    loss.denominators = 1.0
    with pytest.raises(ValueError, match=r"denominators must be None or what .* got 1\.0"):
        loss(data)


def test_denominators_of_every_layout() -> None:
    data: TensorDict = batch(padded=True)
    mask, correct = data["response_mask"], data["correct"]
    expected = denominators_of(mask, correct[:, 0])
    for m in (mask, mask[..., None]):
        for c in (correct[:, :1], correct, correct[..., None]):
            found = denominators_of(m, c)
            assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)
            assert 0 < found.positive_tokens == expected.positive_tokens < found.tokens
    flat = denominators_of(mask.flatten(), correct.flatten())
    assert (flat.tokens, flat.positive_tokens) == (expected.tokens, expected.positive_tokens)
    with pytest.raises(ValueError, match=r"expected mask of shape .* got \[6, 5, 2\]"):
        denominators_of(mask[..., None].expand(B, T, 2))


def test_a_batch_without_steps_gives_no_loss() -> None:
    assert float(total(vapo()(batch(ready=True).reshape(-1)[:0]))) == 0
