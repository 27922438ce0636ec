"""A mini-batch's losses, gradients and metrics are the same however it is cut into ranks and micro-batches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_inputs import NAN, Batch, make_batch, terms_of
from torch import Tensor

from vapo_async.config.algorithm import ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.importance import m2po_keep
from vapo_async.objectives.losses import (
    Denominators,
    add_sums,
    denominators_of,
    policy_metrics,
    value_metrics,
    vapo_value_loss,
)
from vapo_async.objectives.settings import PolicySettings

torch.set_num_threads(1)
LEAVES = ("log_prob", "entropy", "value")
Parts = list[list[list[int]]]


def trimmed(batch: Batch, rows: list[int], extra: int) -> Batch:
    """Some rows, cut to the columns that they use, then padded by ``extra`` columns of NaN."""
    part = {k: v[rows] for k, v in batch.items()}
    used = part["mask"].any(0).nonzero().flatten().tolist()
    left, right = (used[0], used[-1] + 1) if used else (0, 0)

    def cut(x: Tensor) -> Tensor:
        filling = NAN if x.is_floating_point() else 0
        return torch.nn.functional.pad(x[:, left:right], (0, extra), value=filling)

    return {k: cut(v) if v.ndim == 2 else v for k, v in part.items()}


def run(batch: Batch, chosen: PolicySettings, parts: Parts, extra: int = 0) -> tuple[float, float, list[Tensor], Any]:
    """(loss, Σ of the terms' magnitudes, gradients, metrics) of a mini-batch cut into ranks and micro-batches."""
    batch = {k: v.detach().requires_grad_() if k in LEAVES else v for k, v in batch.items()}
    if chosen.importance is ImportanceKind.m2po:
        ratio = batch["log_prob"].detach() - batch["sample_log_prob"]
        batch["keep"] = m2po_keep(ratio, batch["advantage"], batch["mask"], chosen.m2po_threshold)
    counts = [
        denominators_of(batch["mask"][rows], batch["correct"][rows])
        for rank in parts
        for rows in [[row for piece in rank for row in piece]]
    ]
    over = Denominators(*(torch.stack([getattr(c, k) for c in counts]).sum() for k in vars(counts[0])))
    total, magnitude, policy_sums, critic_sums = 0.0, 0.0, {}, {}
    for rank in parts:
        for rows in rank:
            part = trimmed(batch, rows, extra)
            losses, sums = terms_of(part, chosen, over)
            critic, more = vapo_value_loss(
                part["value"],
                part["value_target"],
                mask=part["mask"],
                denominators=over,
                old_value=part["old_value"],
                clip=0.2,
            )
            shares = [*losses.values(), critic]
            torch.stack(shares).sum().backward()
            total += sum(x.item() for x in shares)
            magnitude += sum(abs(x.item()) for x in shares)
            policy_sums, critic_sums = add_sums(policy_sums, sums), add_sums(critic_sums, more)
    gradients = [torch.zeros_like(batch[k]) if batch[k].grad is None else batch[k].grad for k in LEAVES]
    metrics = policy_metrics(policy_sums) | value_metrics(critic_sums)
    return total, magnitude, gradients, {k: v.item() for k, v in metrics.items()}


@st.composite
def cuttings(draw: st.DrawFn, rows: int) -> Parts:
    """The rows in any order, as 1 to 4 ranks of any size (one may be empty), each as 1 to 8 micro-batches."""
    order = draw(st.permutations(range(rows)))

    def split(items: list[int], most: int) -> list[list[int]]:
        edges = sorted(draw(st.lists(st.integers(0, len(items)), max_size=most - 1)))
        return [items[a:b] for a, b in zip([0, *edges], [*edges, len(items)], strict=True)]

    return [split(rank, 8) for rank in split(list(order), 4)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_cutting_a_mini_batch_changes_nothing(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 12))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    importance = data.draw(st.sampled_from(ImportanceKind))
    clipped = importance in (ImportanceKind.naive, ImportanceKind.decoupled, ImportanceKind.a3po)
    chosen = PolicySettings(
        importance=importance,
        mismatch=data.draw(st.sampled_from(MismatchKind)),
        mismatch_low=0.8,
        mismatch_high=1.3,
        aggregation=data.draw(st.sampled_from(LossAggregation)),
        dual_clip=1.4 if clipped and data.draw(st.booleans()) else None,
        behaviour_weight_cap=data.draw(st.sampled_from([None, 1.2])),
        m2po_threshold=data.draw(st.sampled_from([0.05, 0.2, 10.0])),
        nll_coef=0.5,
        entropy_coef=data.draw(st.sampled_from([None, 0.01])),
        kl_coef=data.draw(st.sampled_from([None, 0.1])),
    )
    batch = make_batch(rows=rows, width=9, seed=data.draw(st.integers(0, 10_000)), dtype=dtype)
    verdicts = data.draw(st.sampled_from(["none", "one", "random", "all"]))
    if verdicts != "random":
        batch["correct"] = torch.full((rows,), verdicts == "all")
        batch["correct"][0] |= verdicts == "one"
    parts = data.draw(cuttings(rows))
    one, magnitude, gradients, metrics = run(batch, chosen, [[list(range(rows))]])
    many, _, other_gradients, other_metrics = run(batch, chosen, parts, extra=data.draw(st.integers(0, 2)))
    tolerance = 1e-6 if dtype is torch.float32 else 1e-13
    assert many == pytest.approx(one, rel=0, abs=tolerance * magnitude)
    for a, b in zip(gradients, other_gradients, strict=True):
        assert a.isfinite().all()
        # a micro-batch divides as the whole does, so that gradients agree token by token
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
    assert metrics == pytest.approx(other_metrics, rel=10 * tolerance, abs=10 * tolerance)


def test_keep_of_a_part_is_not_that_of_the_whole() -> None:
    """Why the caller computes ``keep`` once: by itself, each half drops other tokens."""
    batch = make_batch(seed=5)
    ratio = batch["log_prob"].detach() - batch["sample_log_prob"]
    whole = m2po_keep(ratio, batch["advantage"], batch["mask"], 0.25)
    halves = [m2po_keep(ratio[s], batch["advantage"][s], batch["mask"][s], 0.25) for s in (slice(0, 4), slice(4, 8))]
    assert not torch.equal(whole, torch.cat(halves))


@pytest.mark.parametrize("aggregation", list(LossAggregation))
def test_the_average_of_micro_batch_means_is_something_else(aggregation: LossAggregation) -> None:
    """The property above would notice denominators of the part instead of the whole."""
    batch = make_batch(seed=1)
    chosen = PolicySettings(aggregation=aggregation)
    whole = torch.stack(list(terms_of(batch, chosen)[0].values())).sum()
    parts = [trimmed(batch, rows, 0) for rows in ([0, 1, 2], [3, 4, 5, 6, 7])]
    mean = sum(torch.stack(list(terms_of(part, chosen)[0].values())).sum() for part in parts) / 2
    assert abs(whole.item() - mean.item()) > 1e-3
