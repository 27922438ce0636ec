"""LengthAdaptiveGAE on rows of every layout: padding, holes, several trajectories, packed and jagged responses."""

from collections.abc import Iterator

import pytest
import torch
from estimator_batches import (
    EXACT,
    NAN,
    OUT,
    fixed,
    gathered,
    jagged,
    lengths_of,
    moved,
    naive,
    networks,
    ragged_batches,
    responses,
    rollout,
    trajectories,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack
from torch import Tensor, nn

from vapo_async.objectives import LengthAdaptiveGAE
from vapo_async.objectives.advantage import trajectory_lengths
from vapo_async.objectives.layouts import trajectory_ends

torch.set_num_threads(1)


def test_right_padding_does_not_leak_without_done() -> None:
    data = responses((3, 6))
    expected = fixed(0.9, 0.8)(data.clone())
    data["next", "done"].zero_()
    filled = data.apply(lambda x: x.nan_to_num(7.0) if x.is_floating_point() else x)
    filled["next", "terminated"][0, 3:] = True
    for key in OUT:
        torch.testing.assert_close(fixed(0.9, 0.8)(filled.clone())[key], expected[key], **EXACT)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ragged_batches(), st.sampled_from([0.2, 0.5, 2.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_random_rows_against_the_definition(data: TensorDict, alpha: float, gamma: float) -> None:
    lengths = lengths_of(data)
    lmbda = (1 - 1 / (alpha * lengths.double())).clamp(0, 1)
    found = LengthAdaptiveGAE(gamma, alpha=alpha, lmbda_critic=0.8)(data.clone())
    torch.testing.assert_close(found["advantage"], naive(data, gamma, lmbda)["advantage"], **EXACT)
    critic = naive(data, gamma, torch.full(lengths.shape, 0.8, dtype=torch.float64))["advantage"]
    mask = data["response_mask"].unsqueeze(-1)
    expected = torch.where(mask, critic + data["state_value"], 0.0)
    torch.testing.assert_close(found["value_target"], expected, **EXACT)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 400))
def test_ends_of_long_rows_against_the_definition(data: st.DataObject, steps: int) -> None:
    """Where rows are searched in blocks."""
    near = st.one_of(st.integers(0, steps - 1), st.sampled_from([0, 127, 128, 129, 255, 256])).map(
        lambda t: min(t, steps - 1)
    )
    rows = 3
    mask, done = (torch.zeros(rows, steps, dtype=torch.bool) for _ in range(2))
    for b in range(rows):
        start, stop = sorted((data.draw(near), data.draw(near)))
        mask[b, start : stop + 1] = True
        mask[b, data.draw(st.lists(near, max_size=3))] = False
        mask[b, stop] = True
        done[b, data.draw(st.lists(near, max_size=2))] = True
    found = trajectory_ends(mask, done, None)
    lengths = lengths_of(TensorDict({"response_mask": mask, "next": {"done": done.unsqueeze(-1)}}, [rows]))
    counts = mask.sum(1, keepdim=True)
    if found is None:
        assert torch.equal(lengths[mask], counts.expand_as(mask)[mask])
    else:
        assert not (found & ~mask).any()
        assert torch.equal(trajectory_lengths(mask, found)[mask], lengths[mask])


@pytest.mark.parametrize("steps", [1, 128, 300])
def test_rows_that_are_single_trajectories_are_found_to_be(steps: int) -> None:
    """They need no ends, which cost several passes over the data."""
    mask = torch.arange(steps) <= torch.tensor([[0], [steps // 2], [steps - 1]])
    at_last = torch.arange(steps) == torch.tensor([[0], [steps // 2], [steps - 1]])
    for done in (at_last, at_last | ~mask, ~mask, torch.zeros_like(mask)):
        assert trajectory_ends(mask, done, None) is None
    if steps > 1:
        assert trajectory_ends(mask, torch.arange(steps).expand(3, -1) == 0, None) is not None


def layouts_of(data: TensorDict) -> Iterator[tuple[str, TensorDict]]:
    """One batch of responses in other layouts; on the actions the results must be the same, in the same order."""
    mask, lengths = data["response_mask"], data["response_mask"].sum(1, keepdim=True)
    rows, steps = mask.shape
    right = torch.arange(steps).expand(rows, steps)
    yield "left", moved(data, right + steps - lengths, steps)
    yield "both", moved(data, right + 3, steps + 5)
    yield "holes", moved(data, right * 3 + 1, 3 * steps + 4)
    yield "batch size [B, T]", data.clone().auto_batch_size_(2)
    yield "jagged", jagged(data)
    holes = moved(data, right * 2 + 1, 2 * steps + 2)
    yield "jagged with prompts and holes", jagged(holes, torch.arange(2 * steps + 2) < 2 * lengths + 2)


def assert_same_in(layout: TensorDict, data: TensorDict, estimator: LengthAdaptiveGAE, **tolerance: float) -> None:
    expected, found = estimator(data.clone()), estimator(layout)
    for key in OUT:
        assert found[key].is_nested == layout["state_value"].is_nested
        torch.testing.assert_close(gathered(found, key), gathered(expected, key), **(tolerance or EXACT))


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("vtrace", [False, True])
def test_layouts_agree(vtrace: bool, done: bool) -> None:
    data = responses((4, 7, 1, 12, 2))
    if not done:
        data["next", "done"].zero_()
    for _, layout in layouts_of(data):
        assert_same_in(layout, data, LengthAdaptiveGAE(0.97, alpha=0.4, lmbda_critic=0.9, vtrace=vtrace))
        assert_same_in(layout, data, LengthAdaptiveGAE(1.0, lmbda=0.3))


def packed(data: TensorDict, gap: int) -> TensorDict:
    """The rows one after another in a single one, with ``gap`` steps of NaN after each."""
    lengths = (data["response_mask"].sum(1) + gap).tolist()

    def row(entry: Tensor) -> Tensor:
        widths = [(0, 0) * (entry.ndim - 2) + (0, max(0, n - entry.shape[1])) for n in lengths]
        fill = NAN if entry.is_floating_point() else False
        cut = [nn.functional.pad(x[:n], w, value=fill) for x, n, w in zip(entry, lengths, widths, strict=True)]
        return torch.cat(cut).unsqueeze(0)

    out = data.apply(row, batch_size=[1])
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    return out.set("segments", 7 - ids)


@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("done", [True, False])
def test_packed_rows_agree(gap: int, done: bool) -> None:
    data = responses((4, 7, 1, 12, 2))
    if not done:
        data["next", "done"].zero_()
    estimator = LengthAdaptiveGAE(0.97, alpha=0.4, lmbda_critic=0.9)
    expected = estimator(data.clone())
    row = packed(data, gap)
    estimator.set_keys(segment_ids="segments")
    assert "segments" in estimator.in_keys
    found = estimator(row.clone())
    for key in OUT:
        torch.testing.assert_close(gathered(found, key), gathered(expected, key), **EXACT)
    estimator.set_keys(segment_ids=None)
    if not done:
        assert not torch.allclose(gathered(estimator(row), "advantage"), gathered(expected, "advantage"))


def test_dones_inside_of_jagged_and_packed_responses() -> None:
    data = responses((4, 7, 12))
    data["next", "done"][2, 3] = data["next", "done"][1, 0] = True
    plain, estimator = LengthAdaptiveGAE(0.97, alpha=0.4), LengthAdaptiveGAE(0.97, alpha=0.4)
    estimator.set_keys(segment_ids="segments")
    expected = gathered(plain(data.clone()), "advantage")
    torch.testing.assert_close(gathered(plain(jagged(data)), "advantage"), expected, **EXACT)
    torch.testing.assert_close(gathered(estimator(packed(data, 1)), "advantage"), expected, **EXACT)


def test_jagged_rows_may_be_packed_themselves() -> None:
    data = responses((4, 7, 12, 2))
    expected = gathered(LengthAdaptiveGAE(0.97, alpha=0.4)(data.clone()), "advantage")
    data["next", "done"].zero_()
    row = packed(data, 0)
    offsets = torch.tensor([0, 11, 25])  # two rows of two responses each
    two = row.apply(lambda x: torch.nested.nested_tensor_from_jagged(x[0], offsets=offsets), batch_size=[2])
    two["segments"].values()[11:] = two["segments"].values()[10]  # the id of the last response of the first row
    two["segments"].values()[23:] += 1
    estimator = LengthAdaptiveGAE(0.97, alpha=0.4)
    estimator.set_keys(segment_ids="segments")
    torch.testing.assert_close(gathered(estimator(two), "advantage"), expected, **EXACT)


def test_packed_padding_after_the_last_segment_counts_for_nothing() -> None:
    data = packed(responses((4, 7)), 3)
    data["segments"][:, -3:] = -1
    estimator = LengthAdaptiveGAE(0.97, alpha=0.4)
    estimator.set_keys(segment_ids="segments")
    expected = LengthAdaptiveGAE(0.97, alpha=0.4)(responses((4, 7)))
    torch.testing.assert_close(gathered(estimator(data), "advantage"), gathered(expected, "advantage"), **EXACT)


def test_jagged_result_has_the_offsets_of_the_input() -> None:
    data = jagged(responses((4, 7, 2)))
    offsets = data["state_value"].offsets()
    found = LengthAdaptiveGAE()(data)["advantage"]
    assert found.shape == data["state_value"].shape
    assert found.offsets() is offsets


def test_ragged_stacks_have_to_be_made_jagged() -> None:
    data = responses((4, 7, 2))
    rows = [data[i].apply(lambda x, n=n: x[:n], batch_size=[n]) for i, n in enumerate((4, 7, 2))]
    for ragged in (lazy_stack(rows), lazy_stack(rows).densify(layout=torch.jagged)):
        with pytest.raises(ValueError, match=r"ragged batch size \[3, -1\].*batch_size to \[3\]"):
            LengthAdaptiveGAE()(ragged)
    ragged.batch_size = [3]
    expected = LengthAdaptiveGAE()(data.clone())
    torch.testing.assert_close(
        gathered(LengthAdaptiveGAE()(ragged), "advantage"), gathered(expected, "advantage"), **EXACT
    )


@pytest.mark.parametrize("steps", [0, 4])
def test_an_empty_batch_stays_empty(steps: int) -> None:
    data = trajectories((2,), steps)[:0]
    out = LengthAdaptiveGAE()(data)
    assert out["advantage"].shape == (0, steps, 1)


def test_jagged_lambda_key_and_features() -> None:
    data = responses((4, 7, 2))
    wide = data.apply(lambda x: x.expand(*x.shape[:2], 2) if x.ndim == 3 else x)
    lmbda = torch.tensor([0.1, 0.5, 0.9])
    estimator = LengthAdaptiveGAE(0.9, lmbda_key="lam")
    expected = estimator(wide.clone().set("lam", lmbda))["advantage"][data["response_mask"]]
    found = estimator(jagged(wide).set("lam", lmbda))["advantage"].values()
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(found[:, 0], found[:, 1], **EXACT)
    per_step = estimator(jagged(wide.clone().set("lam", lmbda[:, None].expand(3, 7).clone())))
    torch.testing.assert_close(per_step["advantage"].values(), expected, **EXACT)


def test_jagged_entries_must_agree() -> None:
    data = jagged(responses((4, 7, 2)))
    mixed = data.clone().set("state_value", torch.zeros(3, 7, 1))
    with pytest.raises(ValueError, match=r"'state_value' to be jagged like 'response_mask'"):
        LengthAdaptiveGAE()(mixed)
    mixed = data.clone().set(("next", "reward"), torch.zeros(3, 7, 1))
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) to be jagged like the other entries"):
        LengthAdaptiveGAE()(mixed)
    other = jagged(responses((5, 6, 2)))
    with pytest.raises(ValueError, match=r"\[4, 7, 2\], got \[5, 6, 2\]"):
        LengthAdaptiveGAE()(data.clone().set(("next", "reward"), other["next", "reward"]))
    empty = jagged(responses((4, 7, 2)))
    empty["response_mask"].values()[4:11] = False
    with pytest.raises(ValueError, match="'response_mask' has no True step in row 1"):
        LengthAdaptiveGAE()(empty)
    empty["response_mask"].values().fill_(True)
    empty["next", "reward"].values()[12] = NAN
    with pytest.raises(ValueError, match="row 2, step 1"):
        LengthAdaptiveGAE()(empty)


def test_jagged_value_network() -> None:
    _, critic = networks()
    data = rollout((3,), 6, ends="last")
    data = data.apply(lambda x: x, batch_size=[3])
    rows = torch.arange(6) < torch.tensor([[2], [6], [4]])
    data["response_mask"] = rows
    params = TensorDict.from_module(critic).data
    for kwargs in ({}, {"params": params, "target_params": params.clone().apply(lambda p: p * 2)}):
        estimator = LengthAdaptiveGAE(0.9, alpha=0.5, value_network=critic)
        expected, found = estimator(data.clone().auto_batch_size_(2), **kwargs), estimator(jagged(data), **kwargs)
        torch.testing.assert_close(gathered(found, "advantage"), gathered(expected, "advantage"), **EXACT)
        torch.testing.assert_close(found["state_value"].values(), expected["state_value"][rows], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_inputs_are_summed_in_full_precision(dtype: torch.dtype) -> None:
    data = responses((4, 700, 250))
    low = data.apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    exact = low.apply(lambda x: x.double() if x.is_floating_point() else x)
    found, expected = LengthAdaptiveGAE(0.999)(low), LengthAdaptiveGAE(0.999)(exact)
    for key in OUT:
        assert found[key].dtype is torch.float32
        torch.testing.assert_close(found[key], expected[key].float(), rtol=1e-6, atol=1e-5)
