"""Importance, surrogate, value, NLL, aggregation, and the learner's losses put together."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vapo_async.config import AlgorithmConfig, ImportanceKind, LossAggregation
from vapo_async.objectives.aggregate import aggregate, denominator_of
from vapo_async.objectives.importance import behaviour_weight, effective_sample_size, naive_ratio
from vapo_async.objectives.losses import (
    Denominators,
    add_sums,
    denominators_of,
    policy_metrics,
    value_metrics,
    vapo_policy_loss,
    vapo_value_loss,
)
from vapo_async.objectives.nll import positive_nll
from vapo_async.objectives.policy import approx_kl, clip_fractions, clipped_surrogate
from vapo_async.objectives.value import value_loss

torch.set_num_threads(1)
NAN = float("nan")
Batch = dict[str, Tensor]


def make_batch(rows: int = 8, width: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Random rows with NaN outside the mask; ``log_prob``, ``entropy`` and ``value`` are leaves."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 3, (rows, 1), generator=generator)
    ends = torch.randint(3, width + 1, (rows, 1), generator=generator)
    t = torch.arange(width)
    mask = (t >= starts) & (t < ends)

    def draw(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = scale * torch.randn(rows, width, generator=generator, dtype=dtype) + shift
        return x.where(mask, NAN)

    batch = {name: draw(0.3, -1.0) for name in ("log_prob", "sample_log_prob", "prox_log_prob")}
    batch |= {name: draw() for name in ("entropy", "advantage", "value", "value_target", "old_value")}
    batch |= {"mask": mask, "correct": torch.rand(rows, generator=generator) < 0.5}
    return {k: v.requires_grad_() if k in ("log_prob", "entropy", "value") else v for k, v in batch.items()}


def policy_of(batch: Batch, algorithm: AlgorithmConfig, denominators: Denominators) -> tuple[Tensor, dict[str, Tensor]]:
    keys = ("mask", "advantage", "sample_log_prob", "prox_log_prob", "correct")
    kept: dict[str, Any] = {k: batch[k] for k in keys}
    return vapo_policy_loss(batch["log_prob"], batch["entropy"], **kept, algorithm=algorithm, denominators=denominators)


def test_importance_by_hand() -> None:
    log = torch.tensor([0.0, 2.0, 0.5]).log()
    sample = torch.tensor([1.0, 1.0, 1.0]).log()
    weights = behaviour_weight(log.requires_grad_(), sample, 1.5)
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.5, 0.5]), atol=1e-8, rtol=1e-6)
    assert not weights.requires_grad
    torch.testing.assert_close(behaviour_weight(log, sample, None)[1], torch.tensor(2.0))
    ratio = naive_ratio(torch.tensor([500.0], requires_grad=True), torch.tensor([0.0]))
    assert ratio.isfinite().all()
    with pytest.raises(ValueError, match="cap must be positive"):
        behaviour_weight(log, sample, 0.0)
    with pytest.raises(ValueError, match=r"sample_log_prob \[2\]"):
        naive_ratio(log, sample[:2])


def test_effective_sample_size_by_hand() -> None:
    mask = torch.tensor([True, True, True, False])
    size = lambda *w: effective_sample_size(torch.tensor([*w, NAN]), mask).item()  # noqa: E731
    assert size(3.0, 3.0, 3.0) == pytest.approx(1.0)
    assert size(1.0, 0.0, 0.0) == pytest.approx(1 / 3)
    assert size(1.0, 2.0, 3.0) == pytest.approx(36 / (3 * 14))
    assert size(0.0, 0.0, 0.0) == 0.0


def test_clipped_surrogate_by_hand() -> None:
    # r:          inside, above & A>0, above & A<0, below & A>0, below & A<0
    ratio = torch.tensor([1.1, 1.5, 1.5, 0.5, 0.5])
    advantage = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])
    log_ratio = ratio.log().requires_grad_()
    loss = clipped_surrogate(log_ratio, advantage, 0.2, 0.28)
    torch.testing.assert_close(loss, torch.tensor([-2.2, -2.56, 3.0, -1.0, 1.6]))
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-2.2, 0.0, 3.0, -1.0, 0.0]))
    low, high = clip_fractions(log_ratio, advantage, 0.2, 0.28, torch.ones(5, dtype=torch.bool))
    assert low.item() == high.item() == pytest.approx(0.2)
    with pytest.raises(ValueError, match="clip_low"):
        clipped_surrogate(log_ratio, advantage, 1.0, 0.2)


def test_a_ratio_that_overflows_gives_finite_gradients() -> None:
    log_ratio = torch.tensor([200.0, 200.0, -200.0], requires_grad=True)
    clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, 1.0]), 0.2, 0.28).sum().backward()
    assert log_ratio.grad is not None and log_ratio.grad.isfinite().all()


def test_approx_kl_is_k3() -> None:
    log_ratio = torch.tensor([0.0, 2.0, 0.5]).clamp_min(1e-3).log()
    torch.testing.assert_close(approx_kl(log_ratio), log_ratio.exp() - 1 - log_ratio)
    p, q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close((q * approx_kl((p / q).log())).sum(), (q * (q / p).log()).sum())


def test_value_loss_by_hand() -> None:
    value, target = torch.tensor([1.0, 3.0, 0.0], requires_grad=True), torch.tensor([0.0, 1.0, 0.5])
    torch.testing.assert_close(value_loss(value, target), torch.tensor([0.5, 2.0, 0.125]))
    # old 0, clip 0.5: clipped values 0.5, 0.5, 0.0; errors 0.5, -0.5, -0.5
    clipped = value_loss(value, target, torch.zeros(3), 0.5)
    torch.testing.assert_close(clipped, torch.tensor([0.5, 2.0, 0.125]))
    far = value_loss(torch.tensor([1.0]), torch.tensor([1.0]), torch.zeros(1), 0.25)
    torch.testing.assert_close(far, torch.tensor([0.5 * 0.75**2]))
    with pytest.raises(ValueError, match="old_value"):
        value_loss(value, target, clip=0.5)


def test_positive_nll_by_hand() -> None:
    log_prob = torch.tensor([[-1.0, -2.0, NAN], [-4.0, NAN, NAN]])
    mask = log_prob.isfinite()
    assert positive_nll(log_prob, mask, torch.tensor([True, False])).tolist() == [[1.0, 2.0, 0.0], [0.0] * 3]
    with pytest.raises(ValueError, match=r"correct \[3\]"):
        positive_nll(log_prob, mask, torch.tensor([True, False, True]))


def test_aggregate_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = x.isfinite()
    token, sequence = LossAggregation.token, LossAggregation.sequence
    assert denominator_of(mask, token).item() == 3 and denominator_of(mask, sequence).item() == 2
    assert aggregate(x, mask, token, 3.0).item() == 3.0
    assert aggregate(x, mask, sequence, denominator_of(mask, sequence)).item() == 3.5
    assert aggregate(x, torch.zeros_like(mask), token, 0).item() == 0.0
    with pytest.raises(ValueError, match="negative"):
        aggregate(x, mask, token, -1.0)


def test_policy_loss_of_three_tokens_by_hand() -> None:
    """One correct response; w = 0.5, 2 → cap 1.5, 1 and r = 1, 1.5 → clip 1.28, 0.5; A = 1, 1, -1."""
    prox = torch.tensor([[0.2, 0.4, 0.5]])
    sample, theta = prox / torch.tensor([0.5, 2.0, 1.0]), prox * torch.tensor([1.0, 1.5, 0.5])
    mask = torch.ones(1, 3, dtype=torch.bool)
    algorithm = AlgorithmConfig(behaviour_weight_cap=1.5, nll_coef=0.1, entropy_coef=0.0)
    log_prob = theta.log().requires_grad_()
    loss, sums = vapo_policy_loss(
        log_prob,
        None,
        mask=mask,
        advantage=torch.tensor([[1.0, 1.0, -1.0]]),
        sample_log_prob=sample.log(),
        prox_log_prob=prox.log(),
        correct=torch.tensor([True]),
        algorithm=algorithm,
        denominators=Denominators(3.0, 1.0, 3.0),
    )
    objective = (-0.5 * 1.0 - 1.5 * 1.28 + 1.0 * 0.8) / 3
    nll = -theta.log().sum().item() / 3
    assert loss.item() == pytest.approx(objective + 0.1 * nll, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([[-0.5, 0.0, 0.0]]) / 3 - 0.1 / 3)
    metrics = policy_metrics(sums)
    assert metrics["clip_low"] == metrics["clip_high"] == pytest.approx(1 / 3)
    assert metrics["behaviour_weight_capped"] == pytest.approx(1 / 3)
    assert metrics["nll"] == pytest.approx(nll)
    assert metrics["loss_objective"] == pytest.approx(objective)
    rho = torch.tensor([0.5, 3.0, 0.5])
    assert metrics["ess"] == pytest.approx((rho.sum() ** 2 / (3 * rho.square().sum())).item())


@pytest.mark.parametrize("aggregation", list(LossAggregation))
@pytest.mark.parametrize("importance", list(ImportanceKind))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.sets(st.integers(1, 7), max_size=4))
def test_micro_batches_add_up(
    aggregation: LossAggregation, importance: ImportanceKind, seed: int, cuts: set[int]
) -> None:
    """Losses, metrics and gradients of the pieces sum to those of the whole; NLL and empty pieces of it included."""
    algorithm = AlgorithmConfig(importance=importance, aggregation=aggregation, entropy_coef=0.01, nll_coef=0.5)
    whole = make_batch(seed=seed)
    over = denominators_of(whole["mask"], whole["correct"])

    def run(pieces: list[slice]) -> tuple[Tensor, list[Tensor], dict[str, float]]:
        leaves = [whole[k] for k in ("log_prob", "entropy", "value")]
        for leaf in leaves:
            leaf.grad = None
        total, policy_sums, critic_sums = torch.zeros(()), {}, {}
        for piece in pieces:
            part = {k: v[piece] for k, v in whole.items()}
            policy, sums = policy_of(part, algorithm, over)
            critic, more = vapo_value_loss(
                part["value"],
                part["value_target"],
                mask=part["mask"],
                denominators=over,
                old_value=part["old_value"],
                clip=0.2,
            )
            (policy + critic).backward()
            total = total + (policy + critic).detach()
            policy_sums, critic_sums = add_sums(policy_sums, sums), add_sums(critic_sums, more)
        grads = [leaf.grad.clone() for leaf in leaves]
        return total, grads, policy_metrics(policy_sums) | value_metrics(critic_sums)

    edges = [0, *sorted(cuts), 8]
    one, many = run([slice(0, 8)]), run([slice(a, b) for a, b in pairwise(edges)])
    torch.testing.assert_close(one[0], many[0], rtol=0, atol=1e-6)
    for a, b in zip(one[1], many[1], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert one[2] == pytest.approx(many[2], abs=1e-6)


@pytest.mark.parametrize("importance", list(ImportanceKind))
def test_nothing_outside_the_mask_is_read(importance: ImportanceKind) -> None:
    algorithm = AlgorithmConfig(importance=importance, entropy_coef=0.1)
    batch = make_batch()
    over = denominators_of(batch["mask"], batch["correct"])
    loss, sums = policy_of(batch, algorithm, over)
    loss.backward()
    zeroed = {
        k: v.detach().where(batch["mask"], 0) if v.ndim == 2 and v.is_floating_point() else v for k, v in batch.items()
    }
    again, _ = policy_of(zeroed, algorithm, over)
    assert torch.equal(loss, again)
    assert all(s.isfinite() for s in sums.values())
    assert batch["log_prob"].grad is not None and not batch["log_prob"].grad[~batch["mask"]].any()


def test_decoupled_is_naive_when_prox_is_behaviour() -> None:
    batch = make_batch(dtype=torch.float64)
    batch["prox_log_prob"] = batch["sample_log_prob"]
    over = denominators_of(batch["mask"], batch["correct"])
    found = []
    for kind in ImportanceKind:
        loss, _ = policy_of(batch, AlgorithmConfig(importance=kind), over)
        found.append((loss, torch.autograd.grad(loss, batch["log_prob"])[0]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_nll_is_exactly_zero_without_a_correct_response() -> None:
    batch = make_batch()
    batch["correct"] = torch.zeros(8, dtype=torch.bool)
    over = denominators_of(batch["mask"], batch["correct"])
    with_nll, sums = policy_of(batch, AlgorithmConfig(nll_coef=0.1), over)
    without, _ = policy_of(batch, AlgorithmConfig(nll_coef=0.0), over)
    assert sums["loss_nll"].item() == 0.0
    assert torch.equal(with_nll, without)
    assert torch.equal(*(torch.autograd.grad(x, batch["log_prob"])[0] for x in (with_nll, without)))


def test_errors_say_what_is_missing() -> None:
    batch = make_batch()
    over = denominators_of(batch["mask"], batch["correct"])
    with pytest.raises(ValueError, match="needs prox_log_prob"):
        policy_of(batch | {"prox_log_prob": None}, AlgorithmConfig(), over)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="pass the entropy"):
        policy_of(batch | {"entropy": None}, AlgorithmConfig(entropy_coef=0.1), over)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"advantage \[8, 6\]"):
        policy_of(batch | {"advantage": batch["advantage"][:, 1:]}, AlgorithmConfig(), over)


def test_value_metrics_by_hand() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    target = torch.tensor([[1.0, 2.0, 3.0]])
    loss, sums = vapo_value_loss(torch.tensor([[1.0, 2.0, 2.0]]), target, mask=mask, denominators=Denominators(3, 1, 0))
    metrics = value_metrics(sums)
    assert loss.item() == metrics["loss_critic"] == pytest.approx(1 / 6)
    assert metrics["explained_variance"] == pytest.approx(1 - (1 / 3 - 1 / 9) / (2 / 3))
    _, sums = vapo_value_loss(target, torch.full_like(target, 0.1), mask=mask, denominators=Denominators(3, 1, 0))
    assert value_metrics(sums)["explained_variance"] == 0.0
