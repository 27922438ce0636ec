"""Value loss, NLL, aggregation, the policy's other terms and the metrics, against numbers by hand."""

import math

import pytest
import torch
from policy_inputs import (
    ALL_TERMS,
    NAN,
    loss_and_gradient,
    make_batch,
    terms_of,
    three_tokens,
)

from vapo_async.config.algorithm import ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.aggregate import aggregate, denominator_of
from vapo_async.objectives.losses import (
    Denominators,
    denominators_of,
    policy_metrics,
    policy_terms,
    value_metrics,
    vapo_value_loss,
)
from vapo_async.objectives.nll import positive_nll
from vapo_async.objectives.settings import PolicySettings
from vapo_async.objectives.value import value_loss

torch.set_num_threads(1)

NAIVE, DECOUPLED, A3PO, DIS, M2PO = ImportanceKind
NONE, TIS, ICEPOP, MIS = MismatchKind


def test_value_loss_by_hand() -> None:
    value, target = torch.tensor([1.0, 3.0, 0.0], requires_grad=True), torch.tensor([0.0, 1.0, 0.5])
    torch.testing.assert_close(value_loss(value, target), torch.tensor([0.5, 2.0, 0.125]))
    # old 0, clip 0.5: clipped values 0.5, 0.5, 0.0; errors 0.5, -0.5, -0.5
    for clip in (0.5, torch.tensor(0.5)):
        clipped = value_loss(value, target, torch.zeros(3), clip)
        torch.testing.assert_close(clipped, torch.tensor([0.5, 2.0, 0.125]))
    constants = target.clone().requires_grad_(), torch.zeros(3, requires_grad=True)
    value_loss(value, *constants, 0.5).sum().backward()
    assert value.grad is not None and constants[0].grad is None and constants[1].grad is None
    far = value_loss(torch.tensor([1.0]), torch.tensor([1.0]), torch.zeros(1), 0.25)
    torch.testing.assert_close(far, torch.tensor([0.5 * 0.75**2]))
    with pytest.raises(ValueError, match="old_value"):
        value_loss(value, target, clip=0.5)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        value_loss(value, target, target, clip=0)


def test_nothing_outside_the_mask_is_read_by_the_value_loss() -> None:
    batch = make_batch()
    over = denominators_of(batch["mask"])
    loss, sums = vapo_value_loss(
        batch["value"],
        batch["value_target"],
        mask=batch["mask"],
        denominators=over,
        old_value=batch["old_value"],
        clip=0.1,
    )
    gradient = torch.autograd.grad(loss, batch["value"])[0]
    assert loss.isfinite() and all(s.isfinite() for s in sums.values())
    assert not gradient[~batch["mask"]].any() and gradient[batch["mask"]].isfinite().all()


def test_positive_nll_by_hand() -> None:
    log_prob = torch.tensor([[-1.0, -2.0, NAN], [-4.0, NAN, NAN]])
    mask = log_prob.isfinite()
    assert positive_nll(log_prob, mask, torch.tensor([True, False])).tolist() == [[1.0, 2.0, 0.0], [0.0] * 3]
    per_token = torch.tensor([[False, True, True], [True, True, False]])
    assert positive_nll(log_prob, mask, per_token).tolist() == [[0.0, 2.0, 0.0], [4.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=r"correct \[3\]"):
        positive_nll(log_prob, mask, torch.tensor([True, False, True]))
    with pytest.raises(TypeError, match=r"expected correct to be boolean, got dtype torch\.float32"):
        positive_nll(log_prob, mask, torch.tensor([1.0, 0.0]))


def test_aggregate_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, NAN], [NAN, NAN, NAN]])
    mask = x.isfinite()
    token, sequence = LossAggregation.token, LossAggregation.sequence
    assert denominator_of(mask, token).item() == 3 and denominator_of(mask, sequence).item() == 2
    for three in (3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)):
        share = aggregate(x, mask, token, three)
        assert share.item() == 3.0 and share.dtype is torch.float32
    assert aggregate(x, mask, sequence, denominator_of(mask, sequence)).item() == 3.5
    for nothing in (0, 0.0, torch.tensor(0)):
        assert aggregate(x, torch.zeros_like(mask), token, nothing).item() == 0.0
    for wrong in (-1.0, NAN):
        with pytest.raises(ValueError, match="a denominator must not be negative"):
            aggregate(x, mask, token, wrong)


def test_denominators_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    found = denominators_of(mask, torch.tensor([False, True, True]))
    assert (int(found.tokens), int(found.sequences), int(found.positive_tokens)) == (3, 2, 1)
    assert int(denominators_of(mask).positive_tokens) == 0
    assert int(denominators_of(mask, mask).positive_tokens) == 3


def test_the_other_terms_by_hand() -> None:
    batch = three_tokens([1, 2, -3])
    losses, sums = terms_of(batch, PolicySettings(nll_coef=0.1, entropy_coef=0.2, kl_coef=0.3))
    assert list(losses) == ["loss_objective", "loss_nll", "loss_entropy", "loss_kl"]
    # -log 0.2 - log 0.6 - log 0.25 = 1.6094379 + 0.5108256 + 1.3862944 = 3.5065579
    assert losses["loss_nll"].item() == pytest.approx(0.1 * 3.5065579 / 3, rel=1e-7)
    assert losses["loss_entropy"].item() == pytest.approx(-0.2 * 3.0 / 3, rel=1e-7)
    # reference / theta = 0.5, 1, 2: 0.1931472 + 0 + 0.3068528 = 0.5; gradients 0.5, 0, -1
    assert losses["loss_kl"].item() == pytest.approx(0.3 * 0.5 / 3, rel=1e-7)

    def gradient(name: str, of: str) -> list[float]:
        return torch.autograd.grad(losses[name], batch[of], retain_graph=True)[0][0].tolist()

    assert gradient("loss_nll", "log_prob") == pytest.approx([-0.1 / 3] * 3)
    assert gradient("loss_entropy", "entropy") == pytest.approx([-0.2 / 3] * 3)
    assert gradient("loss_kl", "log_prob") == pytest.approx([0.3 * 0.5 / 3, 0.0, -0.3 / 3])
    metrics = policy_metrics(sums)
    assert metrics["nll"].item() == pytest.approx(3.5065579 / 3)
    assert metrics["entropy"].item() == pytest.approx(1.0)
    assert metrics["kl"].item() == pytest.approx(0.5 / 3)


def test_aggregations_by_hand() -> None:
    """Rows of three tokens and of one: -0.66 / 3 and -4 as means, their sums over four tokens."""
    second = three_tokens([4, 0, 0])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch = {k: torch.cat([v.detach(), second[k].detach()]) for k, v in three_tokens([1, 2, -3]).items()}
    batch |= {"mask": mask, "log_prob": batch["log_prob"].clone()}
    batch["log_prob"][1, 0] = batch["sample_log_prob"][1, 0]  # ratio 1, advantage 4
    for how, loss in ((LossAggregation.token, (-0.66 - 4) / 4), (LossAggregation.sequence, (-0.22 - 4) / 2)):
        found, _ = terms_of(batch, PolicySettings(aggregation=how, nll_coef=None))
        assert found["loss_objective"].item() == pytest.approx(loss)


def test_nll_is_exactly_zero_without_a_correct_response() -> None:
    batch = make_batch()
    batch["correct"] = torch.zeros(8, dtype=torch.bool)
    _, sums = terms_of(batch, PolicySettings(nll_coef=0.1))
    with_nll = loss_and_gradient(batch, PolicySettings(nll_coef=0.1))
    without = loss_and_gradient(batch, PolicySettings(nll_coef=None))
    assert sums["loss_nll"].item() == 0.0
    assert torch.equal(with_nll[0], without[0]) and torch.equal(with_nll[1], without[1])


@pytest.mark.parametrize("importance", list(ImportanceKind))
def test_dropped_tokens_touch_the_objective_only(importance: ImportanceKind) -> None:
    batch = make_batch(seed=4)
    settings = PolicySettings(importance=importance, m2po_threshold=1e9, **ALL_TERMS)
    before, _ = terms_of(batch, settings)
    i, t = batch["mask"].nonzero()[2].tolist()
    batch["keep"] = torch.ones_like(batch["mask"])
    batch["keep"][i, t] = False
    after, sums = terms_of(batch, settings)
    for name in ("loss_nll", "loss_entropy", "loss_kl"):
        assert torch.equal(before[name], after[name])
    all_of_it, rest = (torch.autograd.grad(x["loss_objective"], batch["log_prob"])[0] for x in (before, after))
    assert rest[i, t] == 0
    others = batch["mask"] & batch["keep"]
    assert torch.equal(rest[others], all_of_it[others])  # the denominator has not moved
    assert sums["kept"] == sums["tokens"] - 1


def test_metrics_by_hand() -> None:
    """Decoupled with a cap of 1.5, the second token dropped by the caller."""
    batch = three_tokens([1, 2, -3]) | {"keep": torch.tensor([[True, False, True]])}
    _, sums = terms_of(batch, PolicySettings(importance=DECOUPLED, behaviour_weight_cap=1.5))
    assert all(v.dtype is torch.float64 and v.shape == () and not v.requires_grad for v in sums.values())
    metrics = {k: v.item() for k, v in policy_metrics(sums).items()}
    rho = [0.5, 3.0, 0.5]
    expected = {
        "loss_objective": (-0.5 + 2.4) / 3,
        "loss_nll": 0.1 * 3.5065579 / 3,
        "nll": 3.5065579 / 3,
        "positive_share": 1.0,
        "kept_share": 2 / 3,
        "clip_low": 1 / 3,
        "clip_high": 0.0,  # the second token's clip counts for nothing, as it is dropped
        "behaviour_weight": (0.5 + 1.5 + 1) / 3,
        "behaviour_weight_capped": 1 / 3,
        "ratio": 4 / 3,
        "ess": 4**2 / (3 * (0.25 + 9 + 0.25)),
        "kl_behaviour": sum(x - 1 - math.log(x) for x in rho) / 3,
        "kl_reference": sum(x - 1 - math.log(x) for x in [1.0, 1.5, 0.5]) / 3,
        "entropy": 1.0,
        "kl": 0.5 / 3,
    }
    assert metrics == pytest.approx(expected, rel=1e-7)
    batch["keep"] = torch.tensor([[True, True, False]])  # and now for the third token's, on the other side
    metrics = policy_metrics(terms_of(batch, PolicySettings(importance=DECOUPLED))[1])
    assert metrics["clip_low"].item() == 0.0 and metrics["clip_high"].item() == pytest.approx(1 / 3)


def test_metrics_of_dis_and_of_what_is_absent() -> None:
    batch = three_tokens([1, 2, -3])
    settings = PolicySettings(importance=DIS, clip_low=0.3, clip_high=1.5, nll_coef=None)
    _, sums = policy_terms(
        batch["log_prob"],
        None,
        mask=batch["mask"],
        advantage=batch["advantage"],
        sample_log_prob=batch["sample_log_prob"],
        settings=settings,
        denominators=denominators_of(batch["mask"]),
    )
    metrics = policy_metrics(sums)
    assert metrics["clip_low"].item() == pytest.approx(2 / 3) and metrics["clip_high"].item() == pytest.approx(1 / 3)
    assert metrics["kept_share"].item() == metrics["behaviour_weight"].item() == 1.0
    assert not {"nll", "positive_share", "entropy", "kl"} & metrics.keys()


def test_value_metrics_by_hand() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    target = torch.tensor([[1.0, 2.0, 3.0]])
    loss, sums = vapo_value_loss(torch.tensor([[1.0, 2.0, 2.0]]), target, mask=mask, denominators=Denominators(3, 1, 0))
    metrics = value_metrics(sums)
    assert loss.item() == metrics["loss_critic"].item() == pytest.approx(1 / 6)
    assert metrics["explained_variance"].item() == pytest.approx(1 - (1 / 3 - 1 / 9) / (2 / 3))
    assert metrics["value_mean"].item() == pytest.approx(5 / 3) and metrics["target_mean"].item() == 2.0
    _, sums = vapo_value_loss(target, torch.full_like(target, 0.1), mask=mask, denominators=Denominators(3, 1, 0))
    assert value_metrics(sums)["explained_variance"].item() == 0.0
    _, sums = vapo_value_loss(target, target, mask=~mask, denominators=Denominators(3, 1, 0))
    assert all(m.item() == 0.0 for m in value_metrics(sums).values())
