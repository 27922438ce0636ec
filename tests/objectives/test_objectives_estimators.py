"""LengthAdaptiveGAE beside TorchRL's GAE and V-trace, hand-computed numbers and a λ of each trajectory's own."""

import pytest
import torch
from estimator_batches import (
    EXACT,
    NAN,
    OUT,
    f64,
    fixed,
    gathered,
    naive,
    responses,
    torchrl_gae,
    trajectories,
)
from tensordict import TensorDict
from torchrl.objectives.value.functional import vtrace_advantage_estimate

from vapo_async.objectives import LengthAdaptiveGAE

torch.set_num_threads(1)


@pytest.mark.parametrize("ends", ["none", "random", "last", "truncated", "mixed"])
@pytest.mark.parametrize("steps", [1, 3, 50, 200])
@pytest.mark.parametrize("batch", [(3,), (7, 3)])
def test_equals_torchrl_gae(batch: tuple[int, ...], steps: int, ends: str) -> None:
    data = trajectories(batch, steps, ends=ends)
    for gamma in (0.1, 0.5, 0.99, 1.0):
        for lmbda in (0.0, 0.1, 0.5, 0.99, 1.0) if steps < 200 else (0.0, 0.5, 1.0):
            theirs, ours = torchrl_gae(gamma, lmbda)(data.clone()), fixed(gamma, lmbda)
            found = ours(data.clone())
            for key in OUT:
                torch.testing.assert_close(found[key], theirs[key], **EXACT)
            torch.testing.assert_close(ours.value_estimate(data.clone()), theirs["value_target"], **EXACT)


@pytest.mark.parametrize("features", [(1,), (3,)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_equals_torchrl_gae_with_features_and_without_a_mask(features: tuple[int, ...], with_mask: bool) -> None:
    data = trajectories((2, 5), 9, features, "mixed")
    ours = fixed(0.9, 0.8)
    if not with_mask:
        data = data.exclude("response_mask")
        ours.set_keys(response_mask=None)
    theirs, found = torchrl_gae(0.9, 0.8)(data.clone()), ours(data.clone())
    for key in OUT:
        assert found[key].shape == data["state_value"].shape
        torch.testing.assert_close(found[key], theirs[key], **EXACT)


@pytest.mark.parametrize("how", ["constructor", "call", "negative", "name"])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("time", [0, 1, 2])
def test_time_dimension_is_chosen_as_in_gae(time: int, with_mask: bool, how: str) -> None:
    data = trajectories((4, 3, 2)[:2], 6, (2,), "mixed")
    order = [0, 1]
    order.insert(time, 2)
    data = data.permute(order).contiguous()
    if not with_mask:
        data = data.exclude("response_mask")
    if how == "name":
        data.names = [*["a", "b"][:time], "time", *["a", "b"][time:]]
    dim = time - 3 if how == "negative" else time
    kwargs = {"time_dim": dim} if how in ("constructor", "negative") else {}
    call = {"time_dim": dim} if how == "call" else {}
    theirs, ours = torchrl_gae(0.9, 0.7, **kwargs), fixed(0.9, 0.7, **kwargs)
    if not with_mask:
        ours.set_keys(response_mask=None)
    expected, found = theirs(data.clone(), **call), ours(data.clone(), **call)
    for key in OUT:
        torch.testing.assert_close(found[key], expected[key], **EXACT)
    torch.testing.assert_close(ours.value_estimate(data.clone(), **call), expected["value_target"], **EXACT)


def test_one_trajectory_without_batch() -> None:
    data = trajectories((), 8, (1,), "last")
    expected, found = torchrl_gae(0.9, 0.7)(data.clone()), fixed(0.9, 0.7)(data.clone())
    torch.testing.assert_close(found["advantage"], expected["advantage"], **EXACT)


@pytest.mark.parametrize("batch_size", [[3], [3, 6], []])
@pytest.mark.parametrize("mask_feature", [False, True])
def test_the_mask_tells_time_where_the_batch_size_does_not(batch_size: list[int], mask_feature: bool) -> None:
    """GAE itself takes B for the time dimension of a batch of size [B], in silence."""
    data = trajectories((3,), 6, ends="mixed")
    expected = torchrl_gae(0.9, 0.7)(data.clone())["advantage"]
    if mask_feature:
        data["response_mask"] = data["response_mask"].unsqueeze(-1)
    data.batch_size = batch_size
    torch.testing.assert_close(fixed(0.9, 0.7)(data)["advantage"], expected, **EXACT)


def test_entries_without_a_feature_dimension() -> None:
    data = trajectories((3,), 6, ends="mixed")
    expected = fixed(0.9, 0.7)(data.clone())["advantage"].squeeze(-1)
    flat = data.apply(lambda x: x.squeeze(-1) if x.ndim == 3 else x, batch_size=[3])
    for batch_size in ([3], [3, 6]):
        flat.batch_size = batch_size
        torch.testing.assert_close(fixed(0.9, 0.7)(flat.clone())["advantage"], expected, **EXACT)


def test_time_dim_settles_what_is_unclear() -> None:
    data = trajectories((3,), 6, ends="mixed")
    expected = torchrl_gae(0.9, 0.7)(data.clone())["advantage"]
    data = data.exclude("response_mask")
    data.batch_size = [3]
    ours = fixed(0.9, 0.7, time_dim=1)
    ours.set_keys(response_mask=None)
    torch.testing.assert_close(ours(data)["advantage"], expected, **EXACT)
    with pytest.raises(ValueError, match="time_dim 3 is out of range"):
        ours(data, time_dim=3)


def test_missing_terminated_is_done_as_in_gae() -> None:
    data = trajectories((3,), 9, ends="mixed").exclude(("next", "terminated"))
    torch.testing.assert_close(
        fixed(0.9, 0.7)(data.clone())["advantage"], torchrl_gae(0.9, 0.7)(data.clone())["advantage"], **EXACT
    )


def test_average_gae_as_in_gae_and_over_the_mask() -> None:
    data = trajectories((3,), 9, ends="mixed")
    theirs, ours = torchrl_gae(0.9, 0.7, average_gae=True), fixed(0.9, 0.7, average_gae=True)
    expected, found = theirs(data.clone()), ours(data.clone())
    for key in OUT:
        torch.testing.assert_close(found[key], expected[key], **EXACT)
    padded = responses()
    plain = fixed(0.9, 0.7)(padded.clone())
    kept = gathered(plain, "advantage")
    torch.testing.assert_close(gathered(ours(padded), "advantage"), (kept - kept.mean()) / kept.std(), **EXACT)
    torch.testing.assert_close(padded["value_target"], plain["value_target"], **EXACT)
    alone = ours(responses((1,)))
    assert alone["advantage"].item() == 0.0


def test_gradients_as_in_gae() -> None:
    data = trajectories((3,), 7, ends="mixed")
    weight = torch.randn(3, 7, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = []
    for estimator in (torchrl_gae(0.9, 0.7, differentiable=True), fixed(0.9, 0.7, differentiable=True)):
        leaves = data.clone()
        inputs = [leaves["state_value"], leaves["next", "state_value"], leaves["next", "reward"]]
        for x in inputs:
            x.requires_grad_()
        out = estimator(leaves)
        found.append(torch.autograd.grad(((out["advantage"] + 2 * out["value_target"]) * weight).sum(), inputs))
    torch.testing.assert_close(found[1], found[0], **EXACT)
    closed = data.clone()
    closed["state_value"].requires_grad_()
    assert not fixed(0.9, 0.7)(closed)["advantage"].requires_grad


def test_each_row_has_its_own_lambda() -> None:
    data = responses((4, 7, 1, 30))
    found = LengthAdaptiveGAE(0.99, alpha=0.5, lmbda_critic=0.9)(data.clone())
    for b, n in enumerate((4, 7, 1, 30)):
        row = data[b : b + 1].apply(lambda x, n=n: x[:, :n], batch_size=[1, n])
        lmbda = max(0.0, 1 - 1 / (0.5 * n))
        expected = torchrl_gae(0.99, lmbda)(row.clone())["advantage"]
        torch.testing.assert_close(found["advantage"][b : b + 1, :n], expected, **EXACT)
        expected = torchrl_gae(0.99, 0.9)(row.clone())["value_target"]
        torch.testing.assert_close(found["value_target"][b : b + 1, :n], expected, **EXACT)
        assert not found["advantage"][b, n:].any()
        assert not found["value_target"][b, n:].any()


def test_by_hand() -> None:
    """Two trajectories in a row, of 4 steps (λ = 1 − 1/(0.5·4) = 0.5) and 2 (λ = 0); γ = 1, V = 1, in the end 3."""
    ones = torch.ones(1, 6, 1)
    following = ones.clone()
    following[0, -1] = 3
    reward = torch.tensor([0.0, 0, 0, 2, 0, 5]).reshape(1, 6, 1)
    done = torch.tensor([0, 0, 0, 1, 0, 0]).bool().reshape(1, 6, 1)
    data = TensorDict(
        {
            "state_value": ones,
            "response_mask": torch.ones(1, 6, dtype=torch.bool),
            "next": {"state_value": following, "reward": reward, "done": done, "terminated": done},
        },
        [1],
    )
    found = LengthAdaptiveGAE(1.0, alpha=0.5)(data)
    # δ = r + V' − V: 0, 0, 0, then 2 − 1 = 1 (terminal), 0, then 5 + 3 − 1 = 7 (just stops: bootstraps).
    # Â = δ_t + 0.5 Â_{t+1} in the first trajectory; = δ_t in the second.
    torch.testing.assert_close(found["advantage"].flatten(), torch.tensor([0.125, 0.25, 0.5, 1, 0, 7]))
    # λ_critic = 1: the rewards to go, plus V' = 3 where the row stops.
    torch.testing.assert_close(found["value_target"].flatten(), torch.tensor([2.0, 2, 2, 2, 8, 8]))


def test_truncation_bootstraps_and_termination_does_not() -> None:
    def target(done: bool, terminated: bool | None) -> float:
        flag = torch.tensor([[[False], [done], [False]]])
        data = TensorDict(
            {
                "state_value": torch.zeros(1, 3, 1),
                "response_mask": torch.tensor([[True, True, False]]),
                "next": {
                    "state_value": torch.tensor([[[NAN], [10.0], [NAN]]]).nan_to_num(1.0),
                    "reward": torch.tensor([[[0.0], [1.0], [NAN]]]),
                    "done": flag,
                },
            },
            [1],
        )
        if terminated is not None:
            data["next", "terminated"] = torch.tensor([[[False], [terminated], [False]]])
        return LengthAdaptiveGAE(0.5)(data)["value_target"][0, 1].item()

    assert target(done=True, terminated=True) == 1.0
    assert target(done=True, terminated=False) == 6.0  # 1 + 0.5 * 10
    assert target(done=False, terminated=False) == 6.0  # just stops, as at the end of the tensor
    assert target(done=False, terminated=True) == 1.0
    assert target(done=True, terminated=None) == 1.0
    assert target(done=False, terminated=None) == 6.0


def test_lambda_key_per_row_and_per_step() -> None:
    data = trajectories((3,), 3, ends="none")  # B = T: [3] must mean rows
    lmbda = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    data.batch_size = [3]
    estimator = LengthAdaptiveGAE(0.9, lmbda_key="lam")
    expected = torch.cat(
        [
            torchrl_gae(0.9, float(x))(data[i : i + 1].clone().auto_batch_size_(2))["advantage"]
            for i, x in enumerate(lmbda)
        ]
    )
    for entry in (lmbda, lmbda[:, None], lmbda[:, None].expand(3, 3), lmbda[:, None, None].expand(3, 3, 1)):
        found = estimator(data.clone().set("lam", entry.clone()))
        torch.testing.assert_close(found["advantage"], expected, **EXACT)
    steps = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimator(data.clone().set("lam", steps))
    torch.testing.assert_close(found["advantage"], naive(data, 0.9, steps)["advantage"], **EXACT)
    assert estimator.in_keys[-1] == "lam"


def test_vtrace_targets_equal_torchrls() -> None:
    data = trajectories((3,), 9, ends="mixed")
    g = torch.Generator().manual_seed(2)
    behaviour, current = (torch.randn(3, 9, generator=g, dtype=torch.float64) * 0.5 for _ in range(2))
    data.set("sample_log_prob", behaviour).set("prox_log_prob", current)
    following = data["next"]
    for rho, c in ((1.0, 1.0), (2.0, 1.5), (1e9, 1e9)):
        _, expected = vtrace_advantage_estimate(
            f64(0.9),
            current.unsqueeze(-1),
            behaviour.unsqueeze(-1),
            data["state_value"],
            following["state_value"],
            following["reward"],
            following["done"],
            following["terminated"],
            rho_thresh=f64(rho),
            c_thresh=f64(c),
        )
        ours = LengthAdaptiveGAE(0.9, lmbda=0.5, vtrace=True, rho_cap=rho, c_cap=c)
        found = ours(data.clone())
        torch.testing.assert_close(found["value_target"], expected, **EXACT)
        torch.testing.assert_close(ours.value_estimate(data.clone()), expected, **EXACT)
        plain = LengthAdaptiveGAE(0.9, lmbda=0.5)(data.clone())
        torch.testing.assert_close(found["advantage"], plain["advantage"], **EXACT)
        assert not torch.allclose(found["value_target"], plain["value_target"])
    data["prox_log_prob"] = behaviour
    found = LengthAdaptiveGAE(0.9, lmbda_critic=0.6, vtrace=True)(data.clone())
    plain = LengthAdaptiveGAE(0.9, lmbda_critic=0.6)(data.clone())
    torch.testing.assert_close(found["value_target"], plain["value_target"], **EXACT)
