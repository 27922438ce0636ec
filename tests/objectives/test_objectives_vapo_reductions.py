"""How VAPOLoss adds up steps: reductions, micro-batches, layouts, and the coefficients in front."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack, pad_sequence
from torch import Tensor
from vapo_cases import EVERYTHING, EXACT, METRICS, B, T, batch, gradients, total, vapo

from vapo_async.objectives.losses import denominators_of

torch.set_num_threads(1)


# Reductions


@pytest.mark.parametrize("importance", ["naive", "decoupled", "a3po", "dis", "m2po"])
def test_reductions_agree(importance: str) -> None:
    data = batch(padded=True, ready=True)
    kwargs = {"importance": importance, "dual_clip": None if importance in ("dis", "m2po") else 3.0, **EVERYTHING}
    mean, summed, none = (vapo(reduction=how, **kwargs)(data) for how in ("mean", "sum", "none"))
    mask, correct = data["response_mask"], data["correct"]
    positive = int((mask & correct).sum())
    assert 0 < positive < int(mask.sum())
    for name in (key for key in mean.keys() if key.startswith("loss_")):  # noqa: SIM118
        assert none[name].shape == (B, T)
        assert not none[name][~mask].any()
        torch.testing.assert_close(none[name].sum(), summed[name], **EXACT)
        over = positive if name == "loss_nll" else int(mask.sum())
        torch.testing.assert_close(summed[name] / over, mean[name], **EXACT)
    for name in (*METRICS, "nll"):
        torch.testing.assert_close(mean[name], none[name])
        torch.testing.assert_close(mean[name], summed[name])


def test_reductions_by_sequence() -> None:
    data = batch(padded=True, ready=True)
    kwargs = {"aggregation": "sequence", **EVERYTHING}
    mean, none = (vapo(reduction=how, **kwargs)(data) for how in ("mean", "none"))
    length = data["response_mask"].sum(1)
    for name in ("loss_objective", "loss_entropy", "loss_kl"):
        torch.testing.assert_close((none[name].sum(1) / length).mean(), mean[name], **EXACT)
    torch.testing.assert_close(none["loss_critic"].sum() / length.sum(), mean["loss_critic"], **EXACT)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("importance", ["naive", "decoupled", "a3po", "dis"])
def test_micro_batches_add_up_to_the_mini_batch(importance: str, aggregation: str) -> None:
    data = batch(padded=True, ready=True)
    loss = vapo(importance=importance, aggregation=aggregation, **EVERYTHING)
    whole = loss(data)
    loss.denominators = denominators_of(data["response_mask"], data["correct"][:, 0])
    parts = [loss(data[a:b]) for a, b in ((0, 1), (1, 4), (4, B))]
    for name in (key for key in loss.out_keys if key.startswith("loss_")):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], **EXACT)
    many = gradients(sum(total(part) for part in parts), loss)
    torch.testing.assert_close(many, gradients(total(whole), loss), **EXACT)


def test_m2po_micro_batches_add_up_with_the_callers_choice() -> None:
    data = batch(padded=True, ready=True)
    loss = vapo(importance="m2po", nll_coeff=None)
    whole = loss(data)
    assert 0 < float(whole["kept_share"]) < 1
    per_step = vapo(importance="m2po", nll_coeff=None, reduction="none")(data)["loss_objective"]
    data["keep"] = per_step != 0  # what the whole mini-batch keeps
    loss.denominators = denominators_of(data["response_mask"])
    parts = [loss(data[a:b])["loss_objective"] for a, b in ((0, 3), (3, B))]
    torch.testing.assert_close(sum(parts), whole["loss_objective"], **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("importance", ["naive", "decoupled", "a3po"])
def test_entries_of_the_input_are_constants(importance: str, reduction: str) -> None:
    data = batch(ready=True)
    names = ["advantage", "value_target", "sample_log_prob", "prox_log_prob", "ref_log_prob", "state_value"]
    entries = [data[name].requires_grad_() for name in names]
    out = vapo(importance=importance, reduction=reduction, **EVERYTHING)(data)
    assert set(torch.autograd.grad(total(out).sum(), entries, allow_unused=True)) == {None}


def test_what_the_caller_drops_is_out_of_the_objective_only() -> None:
    data = batch(padded=True, ready=True).set(
        "keep", torch.rand(B, T, generator=torch.Generator().manual_seed(0)) > 0.4
    )
    mean, none = (vapo(reduction=how, **EVERYTHING)(data) for how in ("mean", "none"))
    free = vapo(reduction="none", **EVERYTHING)(data.exclude("keep"))
    torch.testing.assert_close(none["loss_objective"], free["loss_objective"] * data["keep"], **EXACT)
    for name in ("loss_nll", "loss_entropy", "loss_kl", "loss_critic"):
        torch.testing.assert_close(none[name], free[name], **EXACT)
    mask = data["response_mask"]
    torch.testing.assert_close(mean["loss_objective"], none["loss_objective"].sum() / mask.sum(), **EXACT)
    assert float(mean["kept_share"]) == pytest.approx(float((data["keep"] & mask).sum() / mask.sum()))


# Layouts


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), left=st.integers(0, 3), right=st.integers(0, 3))
def test_padding_on_either_side_is_never_read(seed: int, left: int, right: int) -> None:
    data = batch(padded=True, ready=True, seed=seed).exclude("next")
    loss = vapo(importance="decoupled", mismatch="mis", mismatch_low=0.7, aggregation="sequence", **EVERYTHING)
    data.batch_size = [B]
    data["correct"] = data["correct"][:, 0]
    expected = loss(data)

    def padded(entry: Tensor) -> Tensor:
        if entry.shape[:2] != (B, T):
            return entry
        fill = {torch.bool: False, torch.int64: 0}.get(entry.dtype, math.nan)
        mask = data["response_mask"].reshape(B, T, *[1] * (entry.ndim - 2))
        entry = entry if entry.dtype is torch.bool else torch.where(mask, entry, fill)
        blank = [torch.full((B, n, *entry.shape[2:]), fill, dtype=entry.dtype) for n in (left, right)]
        return torch.cat([blank[0], entry, blank[1]], 1)

    ragged = data.apply(padded, batch_size=[B])
    ragged["observation"] = ragged["observation"].nan_to_num()  # the networks see it
    found = loss(ragged)
    for key in loss.out_keys:
        torch.testing.assert_close(found[key], expected[key], **EXACT, equal_nan=True)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_verdicts_of_padding_are_not_read(aggregation: str) -> None:
    data = batch(padded=True, ready=True)
    data["correct"] = ~data["response_mask"]
    assert data["correct"].any()
    out = vapo(aggregation=aggregation)(data)
    assert float(out["loss_nll"].detach()) == float(out["nll"]) == 0


def test_flat_steps_are_a_row_each() -> None:
    data = batch(padded=True, ready=True)
    loss = vapo(importance="m2po", mismatch="icepop", **EVERYTHING)
    expected, found = loss(data), loss(data.reshape(-1))
    for key in loss.out_keys[:-1]:  # but lengths are of trajectories
        torch.testing.assert_close(found[key], expected[key], **EXACT, equal_nan=True)
    torch.testing.assert_close(gradients(total(found), loss), gradients(total(expected), loss), **EXACT)
    for kwargs, what in (
        ({"aggregation": "sequence"}, "aggregation 'sequence'"),
        ({"mismatch": "mis"}, "mismatch 'mis'"),
    ):
        with pytest.raises(ValueError, match=rf"{what} needs a row per response, .* flat, \[30\]"):
            vapo(**kwargs)(data.reshape(-1))


def test_packed_rows_are_the_rows_they_hold() -> None:
    """Two responses in a row, each with its own verdict, end and length."""
    rows = batch(ready=False)
    packed = TensorDict.cat([rows[0::2], rows[1::2]], 1)
    assert packed.shape == (B // 2, 2 * T)
    loss = vapo(**{**EVERYTHING, "clip_value": None}).make_value_estimator(gamma=1.0, alpha=0.5)
    loss.length_edges = (T + 1,)
    expected, found = loss(rows), loss(packed)
    for key in loss.out_keys:
        torch.testing.assert_close(found[key], expected[key], **EXACT, equal_nan=True)
    packed["next", "done"] = torch.zeros_like(packed["next", "done"])
    packed["segment_ids"] = torch.arange(2).repeat_interleave(T).expand(B // 2, 2 * T)
    loss.set_keys(segment_ids="segment_ids")
    found = loss(packed)
    for key in loss.out_keys:
        torch.testing.assert_close(found[key], expected[key], **EXACT, equal_nan=True)


def test_ragged_rows_are_padded_by_tensordict() -> None:
    data = batch(padded=True, ready=True)
    lengths = data["response_mask"].sum(1).tolist()
    rows = [row[:n] for row, n in zip(data.unbind(0), lengths, strict=True)]
    loss = vapo(**EVERYTHING)
    found = loss(pad_sequence(rows))
    torch.testing.assert_close(total(found), total(loss(data)), **EXACT)
    together = loss(torch.cat(rows))
    torch.testing.assert_close(total(together), total(loss(data)), **EXACT)
    assert lazy_stack(rows).shape[1] == -1  # a ragged stack itself has no [B, T]


# Coefficients


def test_coefficients_are_buffers_that_a_scheduler_changes() -> None:
    data = batch(ready=True)
    loss = vapo(dual_clip=3.0, **EVERYTHING)
    before = loss(data)
    for name, term in (("entropy_coeff", "loss_entropy"), ("nll_coeff", "loss_nll"), ("kl_coeff", "loss_kl")):
        getattr(loss, name).mul_(2)
        torch.testing.assert_close(loss(data)[term], 2 * before[term], **EXACT)
    loss.critic_coeff = 0.5
    torch.testing.assert_close(loss(data)["loss_critic"], before["loss_critic"] / 2, **EXACT)
    loss.clip_high = 0.05
    assert isinstance(loss.clip_high, Tensor) and float(loss.clip_high) == 0.05
    again = vapo(dual_clip=3.0, clip_epsilon=(0.2, 0.05))(data)
    torch.testing.assert_close(loss(data)["loss_objective"], again["loss_objective"], **EXACT)
    assert float(again["loss_objective"]) != float(before["loss_objective"])
    for name in ("clip_low", "dual_clip", "clip_value"):
        term = "loss_critic" if name == "clip_value" else "loss_objective"
        before = loss(data)
        getattr(loss, name).fill_({"clip_low": 0.01, "dual_clip": 1.01, "clip_value": 0.01}[name])
        assert float(loss(data)[term]) != float(before[term]), name
    decoupled = vapo(importance="decoupled")
    before = decoupled(data)
    decoupled.behaviour_weight_cap.fill_(0.5)
    assert float(decoupled(data)["loss_objective"]) != float(before["loss_objective"])


def test_state_dict_round_trip() -> None:
    data = batch(ready=True)
    loss = vapo(seed=1, clip_epsilon=(0.1, 0.3), behaviour_weight_cap=None, **EVERYTHING)
    loss.entropy_coeff = 0.07
    state = loss.state_dict()
    on = {"clip_low", "clip_high", "nll_coeff", "entropy_coeff", "kl_coeff", "critic_coeff", "clip_value"}
    assert {key for key in state if "." not in key} == on
    other = vapo(seed=2, behaviour_weight_cap=None, **EVERYTHING)
    assert float(total(other(data))) != float(total(loss(data)))
    assert other.load_state_dict(state) == ([], [])
    torch.testing.assert_close(total(other(data)), total(loss(data)), rtol=0, atol=0)
    assert float(loss.bfloat16().clip_high) == 0.3 and loss.actor_network[0].module.weight.dtype == torch.bfloat16
