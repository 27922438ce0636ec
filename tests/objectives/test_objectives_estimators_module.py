"""LengthAdaptiveGAE as a TorchRL module: value networks, keys, buffers, and inside TorchRL's losses."""

import pytest
import torch
from estimator_batches import (
    EXACT,
    NAN,
    OUT,
    fixed,
    networks,
    responses,
    rollout,
    torchrl_gae,
    trajectories,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictParams
from torch import nn
from torchrl.objectives import A2CLoss, ClipPPOLoss

from vapo_async.objectives import LengthAdaptiveGAE

torch.set_num_threads(1)


def test_value_network_as_in_gae() -> None:
    _, critic = networks()
    data = rollout()
    expected, found = torchrl_gae(0.9, 0.7, value_network=critic)(data.clone()), data.clone()
    ours = fixed(0.9, 0.7, value_network=critic)
    found = ours(found)
    for key in (*OUT, "state_value", ("next", "state_value")):
        torch.testing.assert_close(found[key], expected[key], **EXACT)
    params, other = (
        TensorDict.from_module(critic).data,
        TensorDict.from_module(critic).data.clone().apply(lambda p: p + 0.1),
    )
    for target in (None, other):
        expected = torchrl_gae(0.9, 0.7, value_network=critic)(data.clone(), params=params, target_params=target)
        for vmap in (False, True):
            ours = fixed(0.9, 0.7, value_network=critic, deactivate_vmap=vmap)
            found = ours(data.clone(), params=params, target_params=target)
            torch.testing.assert_close(found["advantage"], expected["advantage"], **EXACT)
            torch.testing.assert_close(
                ours.value_estimate(data.clone(), params=params, target_params=target),
                expected["value_target"],
                **EXACT,
            )


def test_value_network_sees_no_gradient_unless_parameters_are_given() -> None:
    _, critic = networks()
    out = fixed(0.9, 0.7, value_network=critic, differentiable=True)(rollout())
    assert not out["advantage"].requires_grad
    params = TensorDictParams(TensorDict.from_module(critic))
    out = fixed(0.9, 0.7, value_network=critic, differentiable=True)(rollout(), params=params)
    assert not out["advantage"].requires_grad  # GAE detaches them, too


def test_skip_existing_keeps_the_values_of_the_input() -> None:
    _, critic = networks()
    data = rollout().update(trajectories((3,), 6).select("state_value", ("next", "state_value")))
    expected = fixed(0.9, 0.7)(data.clone())
    found = fixed(0.9, 0.7, value_network=critic, skip_existing=True)(data.clone())
    torch.testing.assert_close(found["advantage"], expected["advantage"], **EXACT)
    again = fixed(0.9, 0.7, value_network=critic, skip_existing=False)(data.clone())
    assert not torch.equal(again["state_value"], data["state_value"])


def test_nan_next_observations_get_the_values_of_their_steps_as_in_gae() -> None:
    _, critic = networks()
    data = rollout(ends="last")
    data["next", "observation"][:, -1] = NAN
    expected = torchrl_gae(0.9, 0.7, value_network=critic)(data.clone())
    found = fixed(0.9, 0.7, value_network=critic)(data.clone())
    torch.testing.assert_close(found["advantage"], expected["advantage"], **EXACT)
    assert found["state_value"].isfinite().all()


@pytest.mark.parametrize("ends", ["last", "mixed"])
def test_shifted_as_in_gae(ends: str) -> None:
    _, critic = networks()
    data = rollout(steps=12, ends=ends)
    data.names = [None, "time"]
    expected = torchrl_gae(0.9, 0.7, value_network=critic, shifted=True)(data.clone())
    found = fixed(0.9, 0.7, value_network=critic, shifted=True)(data.clone())
    assert torch.equal(found["shifted_valid"], expected["shifted_valid"])
    valid = found["shifted_valid"]
    last = valid & ~torch.cat([valid[:, 1:], torch.ones(3, 1, dtype=torch.bool)], 1)
    # Where a row is cut short right after a terminal step, GAE bootstraps from beyond it; we do not.
    rows = ~(last & data["next", "terminated"].squeeze(-1)).any(1)
    assert rows.any()
    torch.testing.assert_close(found["advantage"][rows], expected["advantage"][rows], **EXACT)
    data.names = None
    data.batch_size = [3]
    with pytest.raises(ValueError, match="shifted needs time"):
        fixed(0.9, 0.7, value_network=critic, shifted=True)(data)


def test_keys_can_be_renamed_and_called_by_keyword() -> None:
    data = trajectories((3,), 6, ends="mixed")
    expected = LengthAdaptiveGAE(0.9, alpha=0.5)(data.clone())
    estimator = LengthAdaptiveGAE(0.9, alpha=0.5)
    estimator.set_keys(value="v", response_mask="m", advantage=("out", "a"), reward="r")
    renamed = data.clone().rename_key_("state_value", "v").rename_key_("response_mask", "m")
    renamed.rename_key_(("next", "state_value"), ("next", "v")).rename_key_(("next", "reward"), ("next", "r"))
    assert set(estimator.in_keys) == set(renamed.keys(True, True))
    assert estimator.out_keys == [("out", "a"), "value_target"]
    torch.testing.assert_close(estimator(renamed.clone())["out", "a"], expected["advantage"], **EXACT)
    keywords = {key if isinstance(key, str) else "_".join(key): renamed[key] for key in estimator.in_keys}
    advantage, target = estimator(**keywords)
    torch.testing.assert_close(advantage, expected["advantage"], **EXACT)
    torch.testing.assert_close(target, expected["value_target"], **EXACT)
    with pytest.raises(KeyError, match="nonsense"):
        estimator.set_keys(nonsense="x")


def test_none_masks_survive_later_set_keys() -> None:
    estimator = LengthAdaptiveGAE()
    estimator.set_keys(response_mask=None)
    estimator.set_keys(advantage="a")
    assert estimator.tensor_keys.response_mask is None
    assert "a" in estimator(trajectories((2,), 3).exclude("response_mask"))


@pytest.mark.parametrize("how", ["name", "class", "instance"])
@pytest.mark.parametrize("loss_class", [ClipPPOLoss, A2CLoss])
def test_torchrls_losses_take_it(loss_class: type, how: str) -> None:
    actor, critic = networks()
    data = rollout(ends="mixed")
    ready = LengthAdaptiveGAE(1.0, alpha=0.5, value_network=critic)(data.clone())
    expected = loss_class(actor, critic)(ready)["loss_objective"]
    loss = loss_class(actor, critic)
    kind = {"name": "length_adaptive_gae", "class": LengthAdaptiveGAE}.get(how)
    if how == "instance":
        loss.make_value_estimator(LengthAdaptiveGAE(1.0, alpha=0.5, value_network=critic))
    elif how == "class":
        loss.make_value_estimator(kind, alpha=0.5, value_network=critic)
    else:
        loss.make_value_estimator(kind, alpha=0.5)
    assert isinstance(loss.value_estimator, LengthAdaptiveGAE)
    torch.testing.assert_close(loss(data)["loss_objective"], expected)


def test_buffers_keep_their_digits() -> None:
    estimator = LengthAdaptiveGAE(0.999, lmbda=0.9999, lmbda_critic=0.99999)
    for convert in (nn.Module.bfloat16, nn.Module.half, nn.Module.float):
        convert(estimator)
        found = [float(x) for x in (estimator.gamma, estimator.lmbda, estimator.lmbda_critic)]
        assert found == [0.999, 0.9999, 0.99999]
    other = LengthAdaptiveGAE(0.5, lmbda=0.5, lmbda_critic=0.5)
    other.load_state_dict(estimator.state_dict())
    assert float(other.lmbda_critic) == 0.99999


def test_input_is_not_changed_but_for_the_results() -> None:
    data = responses()
    before = data.clone()
    after = LengthAdaptiveGAE()(data)
    assert after is data
    assert set(data.keys(True, True)) == {*before.keys(True, True), *OUT}
    for key in before.keys(True, True):
        torch.testing.assert_close(data[key], before[key], rtol=0, atol=0, equal_nan=True)


def test_gradients_through_equal_advantages_are_zero_not_nan() -> None:
    """A standard deviation of 0 under ``average_gae``; TorchRL's GAE gives 0 as well."""
    data = trajectories((2,), 4, ends="last")
    for key in ("state_value", ("next", "state_value"), ("next", "reward")):
        data[key] = torch.zeros_like(data[key])
    value = data["state_value"].clone().requires_grad_()
    data["state_value"] = value
    data["response_mask"] = torch.ones(2, 4, dtype=torch.bool)
    out = LengthAdaptiveGAE(lmbda=0.9, average_gae=True, differentiable=True)(data)
    out["advantage"].sum().backward()
    assert value.grad is not None and value.grad.isfinite().all()
