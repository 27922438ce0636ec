"""LengthAdaptiveGAE names what is wrong with its parameters and its input."""

import math
from typing import Any

import pytest
import torch
from estimator_batches import (
    EXACT,
    NAN,
    responses,
    trajectories,
)
from tensordict import TensorDict

from vapo_async.objectives import LengthAdaptiveGAE

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("batch_size", "shape", "with_mask"),
    [
        ([3], (3, 6, 1), False),  # time or a second feature dimension?
        ([3], (3, 6), False),  # [B, T] or [T, F]?
        ([3, 6, 1], (3, 6, 1), False),  # [B, T, 1] or [B1, B2, T]?
        ([], (3, 6, 1), False),
        ([3, 6, 1], (3, 6, 1), True),
        ([3], (3, 1), True),  # [T, 1] or [B, T]?
        ([2, 3], (2, 3, 6), True),  # [B, T, F] or [B1, B2, T]?
    ],
)
def test_unclear_time_is_an_error(batch_size: list[int], shape: tuple[int, ...], with_mask: bool) -> None:
    flat = torch.zeros(shape, dtype=torch.float64)
    off = torch.zeros(shape, dtype=torch.bool)
    data = TensorDict({"state_value": flat, "next": {"state_value": flat, "reward": flat, "done": off}}, batch_size)
    estimator = LengthAdaptiveGAE()
    if with_mask:
        data["response_mask"] = ~off
    else:
        estimator.set_keys(response_mask=None)
    with pytest.raises(ValueError, match=r"state_value.*is time is not clear.*time_dim"):
        estimator(data)


def test_negative_time_dim_counts_batch_dimensions_and_is_an_error_where_that_misleads() -> None:
    data = trajectories((3,), 6)
    data.batch_size = [3]
    with pytest.raises(ValueError, match="is time is not clear"):
        LengthAdaptiveGAE(time_dim=-1)(data)
    estimator = LengthAdaptiveGAE(time_dim=-1)
    estimator.set_keys(response_mask=None)
    with pytest.raises(ValueError, match="is time is not clear"):
        estimator(data)


def test_a_mask_of_one_flag_per_row_is_an_error() -> None:
    data = trajectories((3,), 6)
    data = TensorDict({**data.to_dict(), "response_mask": torch.ones(3, dtype=torch.bool)}, [3])
    with pytest.raises(ValueError, match="is time is not clear"):
        LengthAdaptiveGAE()(data)


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2), (3, 1, 4), (3, 2, 1)])
def test_lambda_key_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    data = responses((4, 2, 3)).set("lam", torch.full(shape, 0.5))
    with pytest.raises(ValueError, match=r"'lam' of one number per row, \[3\] or \[3, 1\].*\[3, 4\].*got"):
        LengthAdaptiveGAE(lmbda_key="lam")(data)
    wide = TensorDict({**responses((4, 2, 3)).to_dict(), "lam": torch.full((4,), 0.5)}, [])
    with pytest.raises(ValueError, match=r"got \[4\]"):
        LengthAdaptiveGAE(lmbda_key="lam")(wide)


def test_lambda_key_is_checked_on_actions_only() -> None:
    data = responses((4, 2, 3))
    lmbda = torch.where(data["response_mask"], 0.5, NAN)
    found = LengthAdaptiveGAE(0.9, lmbda_key="lam")(data.clone().set("lam", lmbda))
    torch.testing.assert_close(
        found["advantage"], LengthAdaptiveGAE(0.9, lmbda=0.5)(data.clone())["advantage"], **EXACT
    )
    for wrong in (1.5, -0.1, NAN):
        with pytest.raises(ValueError, match=r"'lam' in \[0, 1\]"):
            LengthAdaptiveGAE(lmbda_key="lam")(data.clone().set("lam", torch.full((3,), wrong)))


def test_vtrace_needs_both_log_probs() -> None:
    estimator = LengthAdaptiveGAE(vtrace=True)
    assert {"sample_log_prob", "prox_log_prob"} <= set(estimator.in_keys)
    for key in ("sample_log_prob", "prox_log_prob"):
        with pytest.raises(ValueError, match=f"no '{key}'"):
            estimator(responses().exclude(key))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gamma": -0.1},
        {"gamma": 1.1},
        {"gamma": NAN},
        {"gamma": torch.ones(2)},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": NAN},
        {"lmbda": 1.01},
        {"lmbda": -0.01},
        {"lmbda_critic": 1.01},
        {"lmbda_critic": NAN},
        {"rho_cap": 0.0},
        {"c_cap": -1.0},
    ],
)
def test_parameters_out_of_range(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        LengthAdaptiveGAE(**kwargs)


def test_lambda_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"lmbda \(0.9\) and lmbda_key \('lam'\) exclude each other"):
        LengthAdaptiveGAE(lmbda=0.9, lmbda_key="lam")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("state_value", "value_network"),
        (("next", "state_value"), "value_network"),
        (("next", "reward"), "set_keys"),
        (("next", "done"), "set_keys"),
        ("response_mask", r"set_keys\(response_mask=None\)"),
    ],
)
def test_missing_entries_are_named(key: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as e:
        LengthAdaptiveGAE()(responses().exclude(key))
    assert f"no {key!r}" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("state_value", torch.int64),
        (("next", "reward"), torch.int64),
        (("next", "done"), torch.float32),
        (("next", "terminated"), torch.int64),
        ("response_mask", torch.float32),
    ],
)
def test_wrong_dtypes_are_named(key: Any, dtype: torch.dtype) -> None:
    data = trajectories((2,), 3)
    data[key] = data[key].to(dtype)
    with pytest.raises(TypeError) as e:
        LengthAdaptiveGAE()(data)
    assert repr(key) in str(e.value)
    assert str(dtype) in str(e.value)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (("next", "state_value"), (3, 6, 2)),
        (("next", "reward"), (3, 6)),
        (("next", "reward"), (3, 1, 1)),
        (("next", "done"), (3, 1, 1)),
        (("next", "terminated"), (3, 5, 1)),
        ("response_mask", (3, 5)),
        ("response_mask", (3, 1, 6)),
    ],
)
def test_wrong_shapes_are_named(key: Any, shape: tuple[int, ...]) -> None:
    data = trajectories((3,), 6)
    data.batch_size = [3]
    data["next"].batch_size = [3]
    data[key] = torch.zeros(shape, dtype=data[key].dtype)
    with pytest.raises(ValueError, match=r"expected .*got") as e:
        LengthAdaptiveGAE()(data)
    assert repr(key) in str(e.value)
    assert str(list(shape)) in str(e.value)


@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["state_value", ("next", "state_value"), ("next", "reward")])
def test_what_is_not_finite_on_an_action_is_named(key: Any, wrong: float) -> None:
    data = responses((4, 7, 5))
    data[key][2, 3] = wrong
    with pytest.raises(ValueError, match=f"got {wrong} at row 2, step 3") as e:
        LengthAdaptiveGAE()(data)
    assert repr(key) in str(e.value)
    with pytest.raises(ValueError, match="row 2, step 3"):
        LengthAdaptiveGAE(lmbda_critic=0.5).value_estimate(data)


def test_values_of_first_actions_are_checked_although_no_target_reads_them() -> None:
    data = responses((4, 7))
    data["state_value"][1, 0] = NAN
    assert LengthAdaptiveGAE().value_estimate(data).isfinite().all()
    with pytest.raises(ValueError, match="'state_value' on actions, got nan at row 1, step 0"):
        LengthAdaptiveGAE()(data)


def test_finite_inputs_that_overflow_are_no_error_of_the_input() -> None:
    data = responses((3, 3)).apply(lambda x: x.float() if x.is_floating_point() else x)
    data["next", "reward"] = torch.full((2, 3, 1), 3e38)
    assert LengthAdaptiveGAE()(data)["value_target"].isinf().any()


def test_rows_without_an_action_are_named() -> None:
    data = responses((4, 7, 5, 2))
    data["response_mask"][[1, 3]] = False
    with pytest.raises(ValueError, match=r"'response_mask' has no True step in row 1, 3"):
        LengthAdaptiveGAE()(data)
    data = trajectories((2, 3), 4)
    data["response_mask"][1, 2] = False
    with pytest.raises(ValueError, match=r"row \(1, 2\)"):
        LengthAdaptiveGAE()(data)


def test_multi_step_rewards_are_refused() -> None:
    data = trajectories((2,), 3).set("steps_to_next_obs", torch.full((2, 3, 1), 2))
    with pytest.raises(ValueError, match=r"'steps_to_next_obs'.*gamma 1"):
        LengthAdaptiveGAE(0.9)(data)
    LengthAdaptiveGAE(1.0)(data)


@pytest.mark.parametrize("key", ["sample_log_prob", "prox_log_prob"])
@pytest.mark.parametrize("wrong", [NAN, math.inf])
def test_a_log_prob_that_is_not_finite_is_named(key: str, wrong: float) -> None:
    """Without gradient the truncation of V-trace must not swallow it."""
    data = responses()
    shape = data["response_mask"].shape
    data["sample_log_prob"], data["prox_log_prob"] = torch.zeros(shape), torch.zeros(shape)
    row, step = data["response_mask"].nonzero()[0].tolist()
    data[key][row, step] = wrong
    if wrong == math.inf:
        other = "prox_log_prob" if key == "sample_log_prob" else "sample_log_prob"
        data[other][row, step] = wrong
    with pytest.raises(ValueError, match=r"finite '(sample|prox)_log_prob' on actions"):
        LengthAdaptiveGAE(vtrace=True)(data)


def test_a_mask_with_features_of_its_own_is_an_error() -> None:
    data = trajectories((3,), 6, (2,))
    data.batch_size = [3]
    data["response_mask"] = torch.ones(3, 6, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="is time is not clear"):
        LengthAdaptiveGAE()(data)
