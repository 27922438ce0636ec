"""GroupRelativeAdvantage by hand, beside TorchRL's MCAdvantage, and inside losses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss, PPOLoss
from torchrl.objectives.llm import MCAdvantage

from vapo_async.objectives import GroupRelativeAdvantage

torch.set_num_threads(1)
NAN = math.nan


def responses(rewards: list[float], groups: list[int], lengths: list[int], batch_dims: int = 1) -> TensorDict:
    """Rewards spread over the response's first and last token; NaN in the padding."""
    rows, steps = len(rewards), max(lengths)
    count = torch.tensor(lengths).unsqueeze(1)
    mask = torch.arange(steps) < count
    reward = torch.zeros(rows, steps, dtype=torch.float64)
    reward[:, 0] += torch.tensor(rewards, dtype=torch.float64) / 4
    reward[torch.arange(rows), count.squeeze(1) - 1] += torch.tensor(rewards, dtype=torch.float64) * 3 / 4
    ids = torch.tensor(groups)
    data = {
        "response_mask": mask,
        "group_id": ids if batch_dims == 1 else ids.unsqueeze(1).expand(rows, steps).masked_fill(~mask, -1),
        "next": {"reward": reward.masked_fill(~mask, NAN).unsqueeze(-1)},
    }
    return TensorDict(data, [rows] if batch_dims == 1 else [rows, steps])


def test_by_hand() -> None:
    data = responses([1.0, 3.0, 5.0, -1.0, -1.0, 7.0], [4, 9, 4, 2, 2, 30], [2, 1, 3, 1, 2, 4])
    out = GroupRelativeAdvantage(eps=0.0)(data)
    assert out is data
    each = 2 / math.sqrt(8)  # rewards 1 and 5: mean 3, unbiased standard deviation √8
    expected = torch.zeros(6, 4, 1, dtype=torch.float64)
    expected[0, :2], expected[2, :3] = -each, each
    torch.testing.assert_close(out["advantage"], expected, rtol=0, atol=1e-12)


def test_eps_is_added_to_the_deviation() -> None:
    out = GroupRelativeAdvantage(eps=0.5)(responses([1.0, 5.0], [0, 0], [1, 1]))
    torch.testing.assert_close(out["advantage"][1].item(), 2 / (math.sqrt(8) + 0.5))
    for wrong in (-1e-6, NAN):
        with pytest.raises(ValueError, match="eps"):
            GroupRelativeAdvantage(eps=wrong)


def test_equals_torchrls_mc_advantage() -> None:
    g = torch.Generator().manual_seed(0)
    rewards, lengths = torch.randn(8, generator=g).tolist(), [3, 1, 5, 2, 4, 4, 1, 6]
    groups = [5, 7, 5, 7, 7, 5, 5, 7]
    data = responses(rewards, groups, lengths)
    theirs: dict[int, list[Tensor]] = {}
    transform = MCAdvantage(grpo_size=4, prompt_key="group_id", trajectory_return="sum")
    for row, n in enumerate(lengths):
        done = torch.arange(n).unsqueeze(-1) == n - 1
        following = {"reward": data["next", "reward"][row, :n], "done": done}
        trajectory = TensorDict({"group_id": torch.full((n,), groups[row]), "next": following}, [n])
        out = transform.inv(trajectory)
        if out is not None:
            theirs[groups[row]] = list(
                out["advantage"].split([m for m, k in zip(lengths, groups, strict=True) if k == groups[row]])
            )
    found = GroupRelativeAdvantage(eps=1e-12)(data)["advantage"]
    for row, n in enumerate(lengths):
        torch.testing.assert_close(found[row, :n], theirs[groups[row]].pop(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["[B]", "[B, 1]", "[B, T]", "[B, T, 1]"])
def test_shapes_of_group_ids(shape: str) -> None:
    data = responses([1.0, 2.0, 5.0], [3, 3, 8], [3, 2, 1])
    expected = GroupRelativeAdvantage()(data.clone())["advantage"]
    ids = responses([1.0, 2.0, 5.0], [3, 3, 8], [3, 2, 1], batch_dims=2)["group_id"]
    entry = {"[B]": data["group_id"], "[B, 1]": data["group_id"][:, None], "[B, T]": ids, "[B, T, 1]": ids[..., None]}
    found = GroupRelativeAdvantage()(data.set("group_id", entry[shape]))["advantage"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_batch_size_with_time() -> None:
    arguments = ([1.0, 2.0, 5.0], [3, 3, 8], [3, 2, 1])
    expected = GroupRelativeAdvantage()(responses(*arguments))["advantage"]
    torch.testing.assert_close(GroupRelativeAdvantage()(responses(*arguments, batch_dims=2))["advantage"], expected)


def one_row(data: TensorDict) -> TensorDict:
    """The responses one after another and two steps of padding."""
    mask = data["response_mask"]
    row = data.exclude("group_id").apply(
        lambda x: torch.cat([x[mask], x[0, :1], x[0, :1]]).unsqueeze(0), batch_size=[1]
    )
    row["response_mask"][:, -2:] = False
    ids, segments = (torch.zeros(1, row["response_mask"].shape[1], dtype=torch.int64) for _ in range(2))
    where = mask.nonzero()[:, 0]
    ids[0, :-2], segments[0, :-2], segments[0, -2:] = data["group_id"][where], where, -1
    return row.set("group_id", ids).set("segments", segments)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(-2, 2), st.integers(0, 2), st.integers(1, 5)),
        min_size=1,
        max_size=8,
    )
)
def test_random_batches_in_all_layouts(rows: list[tuple[int, int, int]]) -> None:
    rewards, groups, lengths = ([float(r[0]) for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    data = responses(rewards, groups, lengths)
    mask = data["response_mask"]
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        same = torch.tensor([r for r, k in zip(rewards, groups, strict=True) if k == group], dtype=torch.float64)
        if len(same) > 1 and same.max() > same.min():
            expected[i, : lengths[i]] = (reward - same.mean()) / (same.std() + 1e-6)
    estimator = GroupRelativeAdvantage()
    torch.testing.assert_close(estimator(data.clone())["advantage"].squeeze(-1), expected, rtol=0, atol=1e-12)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    jagged = data.exclude("group_id").apply(
        lambda x: torch.nested.nested_tensor_from_jagged(x[mask], offsets=offsets), batch_size=[len(rows)]
    )
    found = estimator(jagged.set("group_id", data["group_id"]))["advantage"]
    assert found.offsets().tolist() == offsets.tolist()
    torch.testing.assert_close(found.values().squeeze(-1), expected[mask], rtol=0, atol=1e-12)
    packed = one_row(data)
    estimator.set_keys(segment_ids="segments")
    found = estimator(packed)["advantage"].squeeze()
    torch.testing.assert_close(found[:-2].reshape(-1), expected[mask], rtol=0, atol=1e-12)
    assert not found[-2:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_rewards(dtype: torch.dtype) -> None:
    data = responses([1.0, 0.0, 1.0], [0, 0, 0], [2, 3, 1])
    data["next", "reward"] = data["next", "reward"].to(dtype)
    out = GroupRelativeAdvantage()(data)["advantage"]
    assert out.dtype is torch.float32
    torch.testing.assert_close(out[0, 0].item(), (1 / 3) / math.sqrt(1 / 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("key", [("next", "reward"), "response_mask", "group_id"])
def test_missing_entries_are_named(key: Any) -> None:
    with pytest.raises(ValueError, match="the input has no") as e:
        GroupRelativeAdvantage()(responses([1.0], [0], [2]).exclude(key))
    assert repr(key) in str(e.value)


@pytest.mark.parametrize(
    ("key", "dtype"), [(("next", "reward"), torch.int64), ("response_mask", torch.int64), ("group_id", torch.float32)]
)
def test_wrong_dtypes_are_named(key: Any, dtype: torch.dtype) -> None:
    data = responses([1.0, 2.0], [0, 1], [2, 2])
    data[key] = data[key].to(dtype)
    with pytest.raises(TypeError) as e:
        GroupRelativeAdvantage()(data)
    assert repr(key) in str(e.value)
    assert str(dtype) in str(e.value)


def test_wrong_inputs_are_named() -> None:
    data = responses([1.0, 2.0, 0.0], [0, 1, 1], [4, 4, 2])
    with pytest.raises(ValueError, match=r"'group_id' of one number per row, \[3\].*got \[3, 2\]"):
        GroupRelativeAdvantage()(data.clone().set("group_id", torch.zeros(3, 2, dtype=torch.int64)))
    ids = torch.zeros(3, 4, dtype=torch.int64)
    ids[2, 1] = 5
    with pytest.raises(ValueError, match="'group_id' differs within the response of row 2"):
        GroupRelativeAdvantage()(data.clone().set("group_id", ids))
    empty = data.clone()
    empty["response_mask"][1] = False
    with pytest.raises(ValueError, match="'response_mask' has no True step in row 1"):
        GroupRelativeAdvantage()(empty)
    for wrong in (NAN, math.inf):
        broken = data.clone()
        broken["next", "reward"][1, 2] = wrong
        with pytest.raises(ValueError, match=rf"\('next', 'reward'\) on actions, got {wrong} at row 1, step 2"):
            GroupRelativeAdvantage()(broken)


def test_an_empty_batch_stays_empty() -> None:
    assert GroupRelativeAdvantage()(responses([1.0], [0], [4])[:0])["advantage"].shape == (0, 4, 1)


def test_without_a_mask_every_step_counts() -> None:
    data = responses([1.0, 2.0], [0, 0], [3, 3], batch_dims=2)
    expected = GroupRelativeAdvantage()(data.clone())["advantage"]
    estimator = GroupRelativeAdvantage()
    estimator.set_keys(response_mask=None)
    assert estimator.in_keys == [("next", "reward"), "group_id"]
    torch.testing.assert_close(estimator(data.exclude("response_mask"))["advantage"], expected)


def test_keys_can_be_renamed_and_called_by_keyword() -> None:
    data = responses([1.0, 2.0], [0, 0], [3, 2], batch_dims=2)
    expected = GroupRelativeAdvantage()(data.clone())["advantage"]
    estimator = GroupRelativeAdvantage()
    estimator.set_keys(group_id="prompt", response_mask="m", advantage="a", reward="r")
    assert estimator.in_keys == [("next", "r"), "m", "prompt"]
    assert estimator.out_keys == ["a"]
    found = estimator(next_r=data["next", "reward"], m=data["response_mask"], prompt=data["group_id"])
    torch.testing.assert_close(found, expected)
    with pytest.raises(NotImplementedError):
        estimator.value_estimate(data)


def actor_of() -> ProbabilisticTensorDictSequential:
    torch.manual_seed(0)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(4, 5).double(), in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            log_prob_key="sample_log_prob",
        ),
    )


@pytest.mark.parametrize("how", ["name", "class", "instance"])
@pytest.mark.parametrize("loss_class", [PPOLoss, ClipPPOLoss])
def test_torchrls_losses_take_it(loss_class: type, how: str) -> None:
    """Their forward computes missing advantages only with a critic, so the estimator is called before."""
    actor, g = actor_of(), torch.Generator().manual_seed(1)
    data = responses([1.0, 2.0, 4.0], [0, 0, 0], [3, 3, 3], batch_dims=2)
    data["observation"] = torch.randn(3, 3, 4, generator=g, dtype=torch.float64)
    data["action"] = torch.randint(0, 5, (3, 3), generator=g)
    data["sample_log_prob"] = torch.full((3, 3), -1.6, dtype=torch.float64)
    loss = loss_class(actor)
    if how == "instance":
        loss.make_value_estimator(GroupRelativeAdvantage(eps=0.1))
    else:
        loss.make_value_estimator({"name": "group_relative", "class": GroupRelativeAdvantage}[how], eps=0.1)
    loss.set_keys(advantage="group")
    assert isinstance(loss.value_estimator, GroupRelativeAdvantage)
    loss.value_estimator(data)
    each = GroupRelativeAdvantage(eps=0.1)(data.clone())["advantage"]
    torch.testing.assert_close(data["group"], each, rtol=0, atol=0)
    ratio = (actor.get_dist(data).log_prob(data["action"]) + 1.6).exp().unsqueeze(-1)
    gain = torch.min(ratio * each, ratio.clamp(0.8, 1.2) * each) if loss_class is ClipPPOLoss else ratio * each
    torch.testing.assert_close(loss(data)["loss_objective"], -gain.mean())


def test_time_may_be_the_dimension_of_that_name() -> None:
    """[T, B] with names ("time", None) is [B, T] turned."""
    data = responses([1.0, 3.0, 5.0, -1.0], [0, 0, 1, 1], [2, 1, 3, 3], batch_dims=2)
    turned = data.transpose(0, 1).contiguous()
    turned.names = ["time", None]
    expected = GroupRelativeAdvantage()(data)["advantage"]
    assert torch.equal(GroupRelativeAdvantage()(turned)["advantage"].transpose(0, 1), expected)


def test_several_rewards_per_step_are_an_error() -> None:
    data = responses([1.0, 3.0], [0, 0], [2, 2])
    data["next", "reward"] = data["next", "reward"].expand(2, 2, 2)
    with pytest.raises(ValueError, match=r"one number per step, \[B, T, 1\], got \[2, 2, 2\]"):
        GroupRelativeAdvantage()(data)
