"""VAPOLoss itself: keys, value estimators, what it refuses. Its equals are in test_objectives_vapo_torchrl."""

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    TensorDictModule,
)
from torch import Tensor
from torchrl.objectives import ValueEstimators
from torchrl.objectives.value import GAE, TD0Estimator, TD1Estimator, TDLambdaEstimator
from vapo_cases import EVERYTHING, EXACT, METRICS, OF_CRITIC, B, T, batch, networks, total, vapo

from vapo_async.objectives import LengthAdaptiveGAE, VAPOLoss
from vapo_async.objectives.group_estimator import GroupRelativeAdvantage

torch.set_num_threads(1)


# Keys


def test_output_has_what_is_on_in_a_stable_order() -> None:
    data = batch(padded=True, ready=True)
    bare = VAPOLoss(networks()[0], nll_coeff=None)
    assert bare.out_keys == list(bare(data).keys()) == ["loss_objective", *METRICS]
    policy_only = vapo(critic_coeff=None)
    assert policy_only.out_keys == list(policy_only(data).keys()) == ["loss_objective", "loss_nll", "nll", *METRICS]
    everything = vapo(**EVERYTHING)
    terms = ["loss_objective", "loss_nll", "loss_entropy", "loss_kl", "loss_critic", "nll", "entropy", "kl"]
    assert everything.out_keys == list(everything(data).keys()) == [*terms, *METRICS, *OF_CRITIC]
    for key, value in everything(data).items():
        assert value.requires_grad == key.startswith("loss_"), key
    zero = vapo(nll_coeff=0.0, entropy_coeff=0.0)(data).detach()  # a number is on
    assert float(zero["loss_nll"]) == float(zero["loss_entropy"]) == 0 and float(zero["nll"]) > 0


def test_input_keys_are_what_is_read() -> None:
    following = [("next", name) for name in ("observation", "reward", "done", "terminated")]
    actor = ["observation", "action", "response_mask", "sample_log_prob"]
    critic = ["value_target", *following]
    assert vapo(nll_coeff=None).in_keys == [*actor, "advantage", *critic]
    loss = vapo(importance="a3po", mismatch="tis", **EVERYTHING)
    between = ["prox_log_prob", "policy_age", "ref_log_prob", "correct", "advantage", "value_target", "state_value"]
    assert loss.in_keys == [*actor, *between, *following]
    loss.set_keys(response_mask=None, correct="verdict", reward="score")
    between[3] = "verdict"
    following[1] = ("next", "score")
    assert loss.in_keys == [*actor[:2], "sample_log_prob", *between, *following]
    assert VAPOLoss(networks()[0]).in_keys == [*actor, "correct", "advantage", ("next", "reward"), "group_id"]


@pytest.mark.parametrize("kwargs", [{}, {"importance": "decoupled", "nll_coeff": None, "critic_coeff": None}])
@pytest.mark.parametrize("positional", [False, True])
def test_called_with_tensors_instead_of_a_tensordict(kwargs: dict[str, Any], positional: bool) -> None:
    data, loss = batch(padded=True, ready=True), vapo(**kwargs)
    expected = loss(data.select(*loss.in_keys, strict=False))
    if positional:
        found = loss(*(data[key] for key in loss.in_keys))
    else:
        names = {key: "_".join(key) if isinstance(key, tuple) else key for key in loss.in_keys}
        found = loss(**{name: data[key] for key, name in names.items()})
    for key, value in zip(loss.out_keys, found, strict=True):
        torch.testing.assert_close(value, expected[key], equal_nan=True)


def test_called_with_tensors_and_without_advantages() -> None:
    data, loss = batch(), vapo()
    names = {key: "_".join(key) if isinstance(key, tuple) else key for key in loss.in_keys}
    found = loss(**{name: data[key] for key, name in names.items() if key in data.keys(True)})
    torch.testing.assert_close(found[0], loss(data)["loss_objective"])


def test_every_key_can_be_renamed() -> None:
    data = batch(padded=True, ready=True)
    kwargs = {"importance": "a3po", "mismatch": "icepop", **EVERYTHING}
    expected = vapo(**kwargs)(data.set("keep", torch.rand(B, T) > 0.3))
    loss = vapo(**kwargs)
    names = [name for name in vars(loss.tensor_keys) if name in (*data.keys(), "value")]
    assert len(names) == 11
    for name in names:
        key = getattr(loss.tensor_keys, name)
        data.rename_key_(key, f"my_{key}")
    critic = TensorDictModule(loss.critic_network.module, in_keys=["observation"], out_keys=["my_state_value"])
    loss = VAPOLoss(loss.actor_network, critic, **kwargs)
    loss.set_keys(**{name: f"my_{getattr(loss.tensor_keys, name)}" for name in names})
    found = loss(data)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, equal_nan=True)
    loss.set_keys(advantage=None)
    assert loss.tensor_keys.advantage == "advantage" == loss.value_estimator.tensor_keys.advantage
    with pytest.raises(ValueError, match="not an accepted tensordict key"):
        loss.set_keys(nonsense="x")


def test_without_a_mask_every_step_is_an_action() -> None:
    data, loss = batch(), vapo(nll_coeff=None)
    expected = loss(data.clone())
    loss.set_keys(response_mask=None)
    loss.make_value_estimator(gamma=1.0, alpha=0.05)
    loss.set_keys(advantage="advantage")  # another change keeps the mask off
    found = loss(data.exclude("response_mask"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, equal_nan=True)


def test_without_a_mask_and_without_a_critic() -> None:
    data, loss = batch(ready=True), VAPOLoss(networks()[0], nll_coeff=None)
    expected = loss(data)
    loss.set_keys(response_mask=None)
    torch.testing.assert_close(total(loss(data.exclude("response_mask"))), total(expected))


def test_output_keys_can_be_selected() -> None:
    data, loss = batch(ready=True), vapo()
    everything = list(loss(data).keys())
    loss.select_out_keys("loss_objective", "loss_critic")
    assert list(loss(data).keys()) == ["loss_objective", "loss_critic"]
    loss.reset_out_keys()
    assert list(loss(data).keys()) == everything


def test_masks_that_torchrl_writes_are_kept_to() -> None:
    """``SliceSampler(pad_output=True)`` marks its padding under ("collector", "mask")."""
    data, loss = batch(padded=True, ready=True), vapo()
    expected = loss(data)
    data["collector", "mask"] = data["response_mask"].unsqueeze(-1)
    data["response_mask"] = torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(total(loss(data)), total(expected))
    loss.loss_mask_key = None
    assert not torch.allclose(total(loss(data)), total(expected))


# Advantages


@pytest.mark.parametrize(
    "value_type, made",
    [
        (None, LengthAdaptiveGAE),
        ("length_adaptive_gae", LengthAdaptiveGAE),
        (LengthAdaptiveGAE, LengthAdaptiveGAE),
        ("group_relative", GroupRelativeAdvantage),
        (ValueEstimators.GAE, GAE),
        ("gae", GAE),
        (GAE, GAE),
        (ValueEstimators.TD0, TD0Estimator),
        (ValueEstimators.TD1, TD1Estimator),
        (ValueEstimators.TDLambda, TDLambdaEstimator),
    ],
)
@pytest.mark.parametrize("functional", [False, True])
def test_estimators_compute_what_is_missing(value_type: Any, made: type, functional: bool) -> None:
    data = batch().set("group_id", torch.tensor([0, 0, 1, 1, 1, 0])[:, None].expand(B, T))
    group = made is GroupRelativeAdvantage
    loss = vapo(functional=functional, critic_coeff=None if group else 1.0)
    hyperparams = {"gamma": 0.9, "lmbda": 0.8} if value_type is GAE else {} if group else {"gamma": 0.9}
    assert loss.make_value_estimator(value_type, **hyperparams) is loss
    assert type(loss.value_estimator) is made
    assert group or float(loss.value_estimator.gamma) == pytest.approx(0.9)
    out = loss(data)
    assert "advantage" not in data  # the input is left as it is
    critic = networks()[1]
    apart = loss.make_value_estimator(value_type, **hyperparams).value_estimator
    ready = apart(data.clone(), params=loss._estimator_params().get("params"))
    expected = VAPOLoss(networks()[0], critic, critic_coeff=None if group else 1.0)(ready.detach())
    torch.testing.assert_close(total(out), total(expected), **EXACT)
    total(out).backward()
    assert all(p.grad is not None for name, p in loss.named_parameters() if not group or "actor" in name)


def test_an_estimator_that_is_made_already() -> None:
    actor, critic = networks()
    loss = VAPOLoss(actor, critic)
    mine = LengthAdaptiveGAE(0.9, lmbda=0.5, value_network=critic)
    loss.set_keys(advantage="a")
    loss.make_value_estimator(mine)
    assert loss.value_estimator is mine and mine.tensor_keys.advantage == "a"
    with pytest.raises(ValueError, match=r"takes no hyperparameters, got \['gamma'\]"):
        loss.make_value_estimator(mine, gamma=0.5)
    with pytest.raises(KeyError, match="nonsense"):
        loss.make_value_estimator("nonsense")
    assert isinstance(VAPOLoss(actor).value_estimator, GroupRelativeAdvantage)


# What is refused


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"importance": "x"}, "importance must be one of naive, decoupled, a3po, dis, m2po, got 'x'"),
        ({"mismatch": "x"}, "mismatch must be one of none, tis, icepop, mis, got 'x'"),
        ({"aggregation": "x"}, "aggregation must be one of token, sequence, got 'x'"),
        ({"reduction": "x"}, "reduction must be one of mean, sum, none, got 'x'"),
        ({"clip_epsilon": 1.0}, r"clip_epsilon must be .* got 1.0"),
        ({"clip_epsilon": (0.2, -0.1)}, r"clip_epsilon must be .* got \(0.2, -0.1\)"),
        ({"clip_epsilon": math.nan}, "clip_epsilon must be .* got nan"),
        ({"clip_epsilon": (0.1, 0.2, 0.3)}, "clip_epsilon must be"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, or None to switch it off, got 1"),
        ({"behaviour_weight_cap": 0.0}, "behaviour_weight_cap must be above 0"),
        ({"clip_value": -1.0}, "clip_value must be above 0"),
        ({"nll_coeff": -0.1}, "nll_coeff must be at least 0"),
        ({"entropy_coeff": math.nan}, "entropy_coeff must be at least 0"),
        ({"kl_coeff": math.inf}, "kl_coeff must be at least 0"),
        ({"critic_coeff": -1.0}, "critic_coeff must be at least 0"),
        ({"m2po_threshold": 0.0}, "m2po_threshold must be positive"),
        ({"mismatch_low": 3.0}, "mismatch_low < mismatch_high, got 3.0 and 2.0"),
    ],
)
def test_settings_out_of_range_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vapo(**kwargs)


@pytest.mark.parametrize(
    "key, kwargs, message",
    [
        ("action", {}, r"no 'action': add it, .*set_keys\(action=\.\.\.\)"),
        ("response_mask", {}, r"no 'response_mask': .*set_keys\(response_mask=None\) every step is an action"),
        ("sample_log_prob", {}, r"no 'sample_log_prob': .*set_keys\(sample_log_prob=\.\.\.\)"),
        ("prox_log_prob", {"importance": "decoupled"}, "no 'prox_log_prob'"),
        ("prox_log_prob", {"mismatch": "tis"}, "no 'prox_log_prob'"),
        ("policy_age", {"importance": "a3po"}, "no 'policy_age'"),
        ("ref_log_prob", {"kl_coeff": 0.1}, "no 'ref_log_prob'"),
        ("correct", {}, r"no 'correct', which nll_coeff needs, .*nll_coeff=None"),
        ("value_target", {}, "no 'value_target'"),
        ("state_value", {"clip_value": 0.2}, r"no 'state_value': .*set_keys\(value=\.\.\.\)"),
    ],
)
def test_missing_keys_are_named(key: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vapo(**kwargs)(batch(ready=True).exclude(key))


def test_wrong_entries_are_named() -> None:
    data, loss = batch(padded=True, ready=True), vapo()

    def changed(key: str, entry: Tensor) -> TensorDict:
        return data.copy().set(key, entry)

    for key in ("advantage", "value_target", "sample_log_prob"):
        bad = data[key].clone()
        bad[[1, 4], 0] = torch.tensor([math.nan, math.inf], dtype=torch.float64).reshape(2, *[1] * (bad.ndim - 2))
        with pytest.raises(ValueError, match=f"'{key}' is NaN or infinite .* rows 1, 4 of 6"):
            loss(changed(key, bad))
    empty = data["response_mask"].clone()
    empty[3] = False
    with pytest.raises(ValueError, match="'response_mask' leaves nothing of row 3 of 6"):
        loss(changed("response_mask", empty))
    with pytest.raises(ValueError, match=r"'advantage' of shape \[6, 5\] or \[6, 5, 1\], .* got \[6, 5, 2\]"):
        loss(changed("advantage", torch.zeros(B, T, 2)))
    for key in ("response_mask", "correct"):
        with pytest.raises(TypeError, match=f"expected {key} to be boolean, got dtype torch.float64"):
            loss(changed(key, data[key].double()))
    with pytest.raises(TypeError, match="expected keep to be boolean"):
        loss(changed("keep", data["action"]))
