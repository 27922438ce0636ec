"""What the policy's losses read: nothing outside the mask, no value on the host; and what they refuse."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from policy_inputs import (
    ALL_TERMS,
    NAN,
    VARIANTS,
    loss_and_gradient,
    make_batch,
    named,
    terms_of,
)
from torch.utils._python_dispatch import TorchDispatchMode

from vapo_async.config.algorithm import AlgorithmConfig, ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.losses import (
    Denominators,
    denominators_of,
    policy_metrics,
    value_metrics,
    vapo_value_loss,
)
from vapo_async.objectives.settings import PolicySettings

torch.set_num_threads(1)

NAIVE, DECOUPLED, A3PO, DIS, M2PO = ImportanceKind
NONE, TIS, ICEPOP, MIS = MismatchKind


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_nothing_outside_the_mask_is_read(variant: dict[str, Any]) -> None:
    settings = PolicySettings(**variant, **ALL_TERMS)
    batch = make_batch()
    mask = batch["mask"]
    losses, sums = terms_of(batch, settings)
    total = torch.stack(list(losses.values())).sum()
    by_log_prob, by_entropy = torch.autograd.grad(total, (batch["log_prob"], batch["entropy"]))
    for gradient in (by_log_prob, by_entropy):
        assert not gradient[~mask].any() and gradient[mask].isfinite().all() and gradient[mask].any()
    zeroed = {k: v.detach().where(mask, 0) if v.ndim == 2 and v.is_floating_point() else v for k, v in batch.items()}
    zeroed["log_prob"].requires_grad_()
    again, _ = terms_of(zeroed | {"age": batch["age"].where(mask, 99)}, settings)
    assert all(torch.equal(losses[k], again[k]) for k in losses)
    assert all(s.isfinite() for s in sums.values())


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_constants_get_no_gradient(variant: dict[str, Any]) -> None:
    batch = make_batch()
    names = ("advantage", "sample_log_prob", "prox_log_prob", "ref_log_prob", "value_target", "old_value")
    constants = {name: batch[name].requires_grad_() for name in names}
    losses, _ = terms_of(batch, PolicySettings(**variant, **ALL_TERMS))
    value, _ = vapo_value_loss(
        batch["value"],
        batch["value_target"],
        mask=batch["mask"],
        denominators=denominators_of(batch["mask"]),
        old_value=batch["old_value"],
        clip=0.1,
    )
    torch.stack([*losses.values(), value]).sum().backward()
    assert {name: x.grad for name, x in constants.items()} == dict.fromkeys(names)
    assert batch["log_prob"].grad is not None and batch["value"].grad is not None


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 5)])
@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_without_any_token_everything_is_zero(variant: dict[str, Any], shape: tuple[int, int]) -> None:
    nan = torch.full(shape, NAN)
    batch = {k: nan for k in make_batch()} | {
        "log_prob": nan.clone().requires_grad_(),
        "mask": torch.zeros(shape, dtype=torch.bool),
        "age": torch.zeros(shape, dtype=torch.int64),
        "correct": torch.ones(shape[0], dtype=torch.bool),
    }
    for denominators in (None, Denominators(10, 2, 5)):
        losses, sums = terms_of(batch, PolicySettings(**variant, **ALL_TERMS), denominators)
        assert all(loss.item() == 0.0 for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        assert batch["log_prob"].grad is not None and not batch["log_prob"].grad.any()
        assert all(s.item() == 0.0 for s in sums.values())
    assert all(m.item() == 0.0 for m in policy_metrics(sums).values())


def test_impossible_tokens_give_no_nan() -> None:
    """log pi_theta = -inf on a token, where no likelihood term needs it."""
    batch = make_batch(seed=1)
    i, t = batch["mask"].nonzero()[3].tolist()
    with torch.no_grad():
        batch["log_prob"][i, t] = -math.inf
    for variant in VARIANTS:
        loss, gradient = loss_and_gradient(batch, PolicySettings(**variant, nll_coef=None))
        assert loss.isfinite() and gradient.isfinite().all()


def test_halves_are_computed_with_in_float32() -> None:
    batch = make_batch(dtype=torch.bfloat16)
    settings = PolicySettings(importance=DECOUPLED, **ALL_TERMS)
    losses, _ = terms_of(batch, settings)
    assert all(x.dtype is torch.float32 for x in losses.values())
    exact, _ = terms_of({k: v.float() if v.is_floating_point() else v for k, v in batch.items()}, settings)
    assert all(torch.equal(losses[k], exact[k]) for k in losses)
    torch.stack(list(losses.values())).sum().backward()
    assert batch["log_prob"].grad is not None and batch["log_prob"].grad.dtype is torch.bfloat16
    value, _ = vapo_value_loss(
        batch["value"], batch["value_target"], mask=batch["mask"], denominators=denominators_of(batch["mask"])
    )
    assert value.dtype is torch.float32


class NoHostSync(TorchDispatchMode):
    """Refuses what makes the host wait for a device: reading a value, or a shape that depends on values."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexed = name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])
        if name in self.forbidden or indexed:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_mode_of_the_next_test_sees_host_syncs() -> None:
    x = torch.ones(3)
    for sync in (lambda: float(x[0]), lambda: x[x > 0], lambda: bool(x.any()), lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
            sync()


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_coefficients_may_be_scalar_tensors_that_nobody_reads(variant: dict[str, Any]) -> None:
    numbers = PolicySettings(**variant, behaviour_weight_cap=1.4, **ALL_TERMS)
    coefficients = ("clip_low", "clip_high", "dual_clip", "behaviour_weight_cap", "m2po_threshold", *ALL_TERMS)
    tensors = {
        k: torch.tensor(float(getattr(numbers, k)), dtype=torch.float64)
        for k in coefficients
        if getattr(numbers, k) is not None
    }
    scheduled = dataclasses.replace(numbers, **tensors)
    batch = make_batch()
    expected, expected_sums = terms_of(batch, numbers)
    with NoHostSync():
        losses, sums = terms_of(batch, scheduled)
        metrics = policy_metrics(sums)
        value, value_sums = vapo_value_loss(
            batch["value"],
            batch["value_target"],
            mask=batch["mask"],
            denominators=denominators_of(batch["mask"], batch["correct"]),
            old_value=batch["old_value"],
            clip=torch.tensor(0.2),
        )
        metrics |= value_metrics(value_sums)
        (torch.stack(list(losses.values())).sum() + value).backward()
    for k in expected:
        torch.testing.assert_close(losses[k], expected[k], rtol=1e-12, atol=0)
        assert losses[k].shape == ()
    for k in expected_sums:
        torch.testing.assert_close(sums[k], expected_sums[k], rtol=1e-12, atol=1e-15)
    assert all(m.shape == () and m.isfinite() for m in metrics.values())


def test_errors_say_what_is_missing() -> None:
    batch = make_batch()
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"importance": DECOUPLED}, "prox_log_prob", "importance 'decoupled' needs prox_log_prob"),
        ({"mismatch": TIS}, "prox_log_prob", "mismatch 'tis' needs prox_log_prob"),
        ({"mismatch": ICEPOP}, "prox_log_prob", "mismatch 'icepop' needs prox_log_prob"),
        ({"importance": DIS, "mismatch": MIS}, "prox_log_prob", "mismatch 'mis' needs prox_log_prob"),
        ({"importance": A3PO}, "age", "importance 'a3po' needs age"),
        ({"kl_coef": 0.1}, "ref_log_prob", "pass ref_log_prob"),
        ({"nll_coef": 0.1}, "correct", "pass correct"),
    ]
    for chosen, key, message in cases:
        terms_of(batch, PolicySettings(**chosen))
        with pytest.raises(ValueError, match=message):
            terms_of(batch, PolicySettings(**chosen), **{key: None})
    with pytest.raises(ValueError, match="pass entropy"):
        terms_of(batch | {"entropy": None}, PolicySettings(entropy_coef=0.1))
    for key in ("advantage", "sample_log_prob", "prox_log_prob", "ref_log_prob", "age", "keep", "mask"):
        full = torch.ones(8, 7, dtype=torch.bool) if key == "keep" else batch[key]
        with pytest.raises(ValueError, match=rf"log_prob \[8, 7\].*{key} \[8, 6\]"):
            terms_of(batch, PolicySettings(), denominators_of(batch["mask"]), **{key: full[:, 1:]})
    with pytest.raises(TypeError, match=r"keep to be boolean, got dtype torch\.float32"):
        terms_of(batch, PolicySettings(), keep=torch.ones(8, 7))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"importance": "naive"}, "importance must be one of ImportanceKind.naive, .*, got 'naive'"),
        ({"mismatch": None}, "mismatch must be one of MismatchKind.none, .*, got None"),
        ({"aggregation": 1}, "aggregation must be one of LossAggregation.token, .*, got 1"),
        ({"clip_low": 1.5}, "expected 0 <= clip_low < 1"),
        ({"clip_high": torch.tensor([0.2])}, r"clip_high to be a number or a tensor of shape \[\], got \[1\]"),
        ({"behaviour_weight_cap": 0.0}, "behaviour_weight_cap must be positive, got 0.0"),
        ({"m2po_threshold": -1.0}, "m2po_threshold must be positive, got -1.0"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1, got 0.5"),
        ({"mismatch_low": 3.0}, "0 <= mismatch_low < mismatch_high, got 3.0 and 2.0"),
    ],
)
def test_settings_refuse_what_is_out_of_range(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicySettings(**chosen)


def test_settings_of_the_configuration() -> None:
    """Every field has its namesake in the configuration; a coefficient of 0 switches a term off."""
    changed = AlgorithmConfig(
        clip_low=0.3,
        clip_high=5.0,
        importance=A3PO,
        behaviour_weight_cap=2.5,
        m2po_threshold=0.5,
        mismatch=TIS,
        mismatch_low=0.25,
        mismatch_high=3.0,
        dual_clip=4.0,
        aggregation=LossAggregation.sequence,
        nll_coef=0.7,
        entropy_coef=0.01,
        kl_coef=0.05,
    )
    found = PolicySettings.of(changed)
    default = PolicySettings()
    for field in dataclasses.fields(PolicySettings):
        assert getattr(found, field.name) == getattr(changed, field.name) != getattr(default, field.name)
    off = PolicySettings.of(AlgorithmConfig(nll_coef=0, entropy_coef=0, kl_coef=0))
    assert off.nll_coef is off.entropy_coef is off.kl_coef is None
