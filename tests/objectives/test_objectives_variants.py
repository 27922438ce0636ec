"""Every way of correcting the lag: three tokens by hand, an oracle, gradients, and which objectives are one another."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from policy_inputs import (
    ALL_TERMS,
    VARIANTS,
    loss_and_gradient,
    make_batch,
    named,
    oracle,
    terms_of,
    three_tokens,
)
from torch import Tensor

from vapo_async.config.algorithm import ImportanceKind, MismatchKind
from vapo_async.objectives.importance import a3po_prox_log_prob, m2po_keep, mismatch_correction
from vapo_async.objectives.losses import (
    policy_metrics,
)
from vapo_async.objectives.settings import PolicySettings

torch.set_num_threads(1)

NAIVE, DECOUPLED, A3PO, DIS, M2PO = ImportanceKind
NONE, TIS, ICEPOP, MIS = MismatchKind


# Variants: settings, advantages, then the loss and its gradient by log pi_theta, both times three (three tokens).
HAND: dict[str, tuple[dict[str, Any], list[float], float, list[float]]] = {
    # min(0.5, 0.8), min(6, 2.56), min(-1.5, -2.4)
    "naive": ({"importance": NAIVE}, [1, 2, -3], -0.5 - 2.56 + 2.4, [-0.5, 0, 0]),
    # the second is bounded by 2 * -2 = -4 instead of min(-6, -2.56) = -6
    "dual_clip": ({"importance": NAIVE, "dual_clip": 2.0}, [1, -2, -3], -0.5 + 4 + 2.4, [-0.5, 0, 0]),
    "no_dual_clip": ({"importance": NAIVE}, [1, -2, -3], -0.5 + 6 + 2.4, [-0.5, 6, 0]),
    # 0.5 * min(1, 1), 2 * min(3, 2.56), 1 * min(-1.5, -2.4)
    "decoupled": (
        {"importance": DECOUPLED, "behaviour_weight_cap": None},
        [1, 2, -3],
        -0.5 - 5.12 + 2.4,
        [-0.5, 0, 0],
    ),
    # the second weighs 1.5 instead of 2: 1.5 * 2.56
    "decoupled_capped": (
        {"importance": DECOUPLED, "behaviour_weight_cap": 1.5},
        [1, 2, -3],
        -0.5 - 3.84 + 2.4,
        [-0.5, 0, 0],
    ),
    # and with the clip out of the way 1.5 * 1.5 * 2 (gradient -w r A) and 1 * 0.5 * 3
    "decoupled_unclipped": (
        {"importance": DECOUPLED, "behaviour_weight_cap": 1.5, "clip_low": 0.9, "clip_high": 9.0},
        [1, 2, -3],
        -0.5 - 4.5 + 1.5,
        [-0.5, -4.5, 1.5],
    ),
    # ages 0, 1, 3: r = rho^(1/(d+1)), w = rho^(d/(d+1)): 0.5 and 1; 3^(1/2) = 1.7320508 (clipped at 1.28) twice;
    # 0.5^(1/4) = 0.8408964 (inside) and 0.5^(3/4) = 0.5946036. 1.7320508 * 2.56 = 4.4340501; 0.5 * 3 = 1.5
    "a3po": ({"importance": A3PO}, [1, 2, -3], -0.5 - 4.4340501 + 1.5, [-0.5, 0, 1.5]),
    # weights cut to 0.55: 0.55 * 0.5, 0.55 * 2.56 = 1.408, 0.55 * 0.8408964 * 3 = 1.3874791
    "a3po_capped": (
        {"importance": A3PO, "behaviour_weight_cap": 0.55},
        [1, 2, -3],
        -0.275 - 1.408 + 1.3874791,
        [-0.275, 0, 1.3874791],
    ),
    # range (0.7, 6): only 3 is inside; -3 * 2 * log 0.6 = 6 * 0.5108256
    "dis": ({"importance": DIS, "clip_low": 0.3, "clip_high": 5.0}, [1, 2, -3], 3.0649537, [0, -6, 0]),
    # range (0.4, 6): all inside; -0.5 log 0.2 = 0.8047190, then 3.0649537, and 1.5 log 0.25 = -2.0794415
    "dis_wide": (
        {"importance": DIS, "clip_low": 0.6, "clip_high": 5.0},
        [1, 2, -3],
        0.8047190 + 3.0649537 - 2.0794415,
        [-0.5, -6, 1.5],
    ),
    # (log rho)^2 = 0.4805, 1.2069, 0.4805; harmful: the second and the third. Mean 0.7226 < 0.8: all stay
    "m2po_all": ({"importance": M2PO, "m2po_threshold": 0.8}, [1, 2, -3], -0.5 - 6 + 1.5, [-0.5, -6, 1.5]),
    # 0.7226 >= 0.5, so that the second goes; 0.4805 < 0.5
    "m2po": ({"importance": M2PO, "m2po_threshold": 0.5}, [1, 2, -3], -0.5 + 1.5, [-0.5, 0, 1.5]),
    # 0.4805 >= 0.4: the third goes too, the harmless first stays
    "m2po_tight": ({"importance": M2PO, "m2po_threshold": 0.4}, [1, 2, -3], -0.5, [-0.5, 0, 0]),
    # m' = 0.5, 1.5, 1: rho' = 0.5, 2.25, 0.5; with clip_high 9 the second is 2.25 * 2
    "tis_naive": (
        {"importance": NAIVE, "mismatch": TIS, "mismatch_high": 1.5, "clip_high": 9.0},
        [1, 2, -3],
        -0.5 - 4.5 + 2.4,
        [-0.5, -4.5, 0],
    ),
    # the weight of the second is 1.5: as decoupled_capped
    "tis_decoupled": (
        {"importance": DECOUPLED, "mismatch": TIS, "mismatch_high": 1.5, "behaviour_weight_cap": None},
        [1, 2, -3],
        -0.5 - 3.84 + 2.4,
        [-0.5, 0, 0],
    ),
    # f(rho') = 0.5, 2.25, 0.5: the second is -2.25 * 2 * log 0.6 = 4.5 * 0.5108256 = 2.2987153
    "tis_dis": (
        {"importance": DIS, "mismatch": TIS, "mismatch_high": 1.5, "clip_low": 0.6, "clip_high": 5.0},
        [1, 2, -3],
        0.8047190 + 2.2987153 - 2.0794415,
        [-0.5, -4.5, 1.5],
    ),
    # m = 2 is outside [0.4, 1.9]: the second goes and stays in the denominator
    "icepop": (
        {"importance": DECOUPLED, "mismatch": ICEPOP, "mismatch_low": 0.4, "mismatch_high": 1.9},
        [1, 2, -3],
        -0.5 + 2.4,
        [-0.5, 0, 0],
    ),
    # the geometric mean (0.5 * 2 * 1)^(1/3) = 1 is inside [0.9, 1.1], although 0.5 and 2 are not
    "mis": (
        {"importance": DECOUPLED, "mismatch": MIS, "mismatch_low": 0.9, "mismatch_high": 1.1},
        [1, 2, -3],
        -0.5 - 5.12 + 2.4,
        [-0.5, 0, 0],
    ),
    # and outside [1.1, 2]: the response goes
    "mis_dropped": (
        {"importance": DECOUPLED, "mismatch": MIS, "mismatch_low": 1.1, "mismatch_high": 2.0},
        [1, 2, -3],
        0.0,
        [0, 0, 0],
    ),
}


@pytest.mark.parametrize("variant", HAND)
def test_three_tokens_by_hand(variant: str) -> None:
    chosen, advantage, loss, gradient = HAND[variant]
    batch = three_tokens(advantage)
    losses, _ = terms_of(batch, PolicySettings(**chosen, nll_coef=None))
    assert list(losses) == ["loss_objective"]
    assert losses["loss_objective"].item() == pytest.approx(loss / 3, rel=1e-7)
    losses["loss_objective"].backward()
    expected = torch.tensor([gradient], dtype=torch.float64) / 3
    torch.testing.assert_close(batch["log_prob"].grad, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_loss_and_gradient_are_those_of_the_oracle(variant: dict[str, Any]) -> None:
    """All terms, in float64, against Python floats; the gradient by central differences of the oracle."""
    settings = PolicySettings(
        **variant, behaviour_weight_cap=1.4, m2po_threshold=0.25, mismatch_low=0.8, mismatch_high=1.3, **ALL_TERMS
    )
    batch = make_batch(seed=5)
    loss, gradient = loss_and_gradient(batch, settings)
    theta = batch["log_prob"].tolist()
    assert loss.item() == pytest.approx(oracle(theta, batch, settings), rel=1e-12)
    h = 1e-6
    for i, t in batch["mask"].nonzero().tolist():
        value = theta[i][t]
        theta[i][t] = value + h
        above = oracle(theta, batch, settings)
        theta[i][t] = value - h
        below = oracle(theta, batch, settings)
        theta[i][t] = value
        assert gradient[i, t].item() == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["importance"] in (NAIVE, DECOUPLED, M2PO)], ids=named)
def test_gradcheck(variant: dict[str, Any]) -> None:
    """Autograd's own check, where what carries no gradient does not depend on ``log_prob`` either."""
    settings = PolicySettings(**variant, behaviour_weight_cap=1.4, mismatch_low=0.8, mismatch_high=1.3, **ALL_TERMS)
    batch = make_batch(rows=3, width=5, seed=5)
    mask = batch["mask"]
    if settings.importance is M2PO:
        ratio = batch["log_prob"] - batch["sample_log_prob"]
        batch["keep"] = m2po_keep(ratio, batch["advantage"], mask, 0.15)
        assert 0 < (mask & ~batch["keep"]).sum() < mask.sum()

    def total(log_prob: Tensor, entropy: Tensor) -> Tensor:
        losses, _ = terms_of(batch | {"log_prob": log_prob, "entropy": entropy}, settings)
        return torch.stack(list(losses.values())).sum()

    assert torch.autograd.gradcheck(total, (batch["log_prob"], batch["entropy"]), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v["importance"] is A3PO], ids=named)
def test_a3po_is_decoupled_with_an_interpolated_policy(variant: dict[str, Any]) -> None:
    """The interpolation is a constant: gradients are those of the same numbers given as ``prox_log_prob``."""
    settings = PolicySettings(**variant, behaviour_weight_cap=1.4, mismatch_low=0.8, mismatch_high=1.3, **ALL_TERMS)
    batch = make_batch(seed=5)
    found = loss_and_gradient(batch, settings)
    s, mask = settings, batch["mask"]
    batch["sample_log_prob"], batch["keep"] = mismatch_correction(
        s.mismatch, batch["sample_log_prob"], batch["prox_log_prob"], mask, s.mismatch_low, s.mismatch_high
    )
    batch["prox_log_prob"] = a3po_prox_log_prob(batch["log_prob"], batch["sample_log_prob"], batch["age"])
    as_decoupled = dataclasses.replace(settings, importance=DECOUPLED, mismatch=NONE)
    torch.testing.assert_close(found, loss_and_gradient(batch, as_decoupled), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("importance", [NAIVE, DECOUPLED, A3PO, DIS, M2PO])
@pytest.mark.parametrize("mismatch", list(MismatchKind))
def test_on_policy_all_objectives_have_the_policy_gradient(importance: ImportanceKind, mismatch: MismatchKind) -> None:
    """Where the three policies are one, the gradient is -A/N, and no correction does anything."""
    batch = make_batch(seed=2)
    same = batch["log_prob"].detach()
    batch |= {"sample_log_prob": same, "prox_log_prob": same}
    settings = PolicySettings(importance=importance, mismatch=mismatch, behaviour_weight_cap=1.0, nll_coef=None)
    _, gradient = loss_and_gradient(batch, settings)
    expected = torch.where(batch["mask"], -batch["advantage"] / batch["mask"].sum(), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
    metrics = policy_metrics(terms_of(batch, settings)[1])
    assert metrics["kept_share"].item() == metrics["ess"].item() == 1.0
    assert metrics["behaviour_weight_capped"].item() == metrics["kl_behaviour"].item() == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_objectives_that_are_one_another(seed: int) -> None:
    batch = make_batch(seed=seed)

    def of(**chosen: Any) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(batch, PolicySettings(**{"behaviour_weight_cap": None} | chosen))

    def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
        assert a[1].abs().sum() > 0

    for kind in ImportanceKind:  # nothing truncated, nothing outside: no correction
        for mismatch in (TIS, ICEPOP, MIS):
            free = {"mismatch": mismatch, "mismatch_low": 0.0, "mismatch_high": math.inf}
            assert_same(of(importance=kind, **free), of(importance=kind))
    truncated = {"mismatch": TIS, "mismatch_high": 1.2}
    assert_same(of(importance=DECOUPLED, **truncated), of(importance=DECOUPLED, behaviour_weight_cap=1.2))
    # truncation counts once: a cap above it changes nothing, one below it wins
    assert_same(of(importance=DECOUPLED, **truncated, behaviour_weight_cap=3.0), of(importance=DECOUPLED, **truncated))
    assert_same(
        of(importance=DECOUPLED, **truncated, behaviour_weight_cap=1.1),
        of(importance=DECOUPLED, behaviour_weight_cap=1.1),
    )
    # without any clip the factors of decoupled and a3po multiply to naive's ratio, which is m2po's with nothing masked
    wide = {"clip_low": 0.999999, "clip_high": 1e6}
    for kind in (DECOUPLED, A3PO):
        assert_same(of(importance=kind, **wide), of(importance=NAIVE, **wide))
    assert_same(of(importance=M2PO, m2po_threshold=1e6), of(importance=NAIVE, **wide))
    # the gradient of dis is that of the unclipped ratio
    assert_same((torch.zeros(()), of(importance=DIS, **wide)[1]), (torch.zeros(()), of(importance=NAIVE, **wide)[1]))
    # an age of 0 everywhere is naive
    batch["age"] = torch.zeros_like(batch["age"])
    assert_same(of(importance=A3PO), of(importance=NAIVE))
