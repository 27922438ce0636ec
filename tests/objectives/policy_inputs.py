"""Random inputs of the policy's and the critic's losses, and an oracle of the policy's in plain Python floats."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from vapo_async.config.algorithm import ImportanceKind, LossAggregation, MismatchKind
from vapo_async.objectives.losses import Denominators, denominators_of, policy_terms
from vapo_async.objectives.settings import PolicySettings

NAN = float("nan")
Batch = dict[str, Tensor]
ALL_TERMS = {"nll_coef": 0.5, "entropy_coef": 0.01, "kl_coef": 0.2}
VARIANTS: list[dict[str, Any]] = [
    {"importance": importance, "mismatch": mismatch} | more
    for importance, mismatch in itertools.product(ImportanceKind, MismatchKind)
    for more in (
        {},
        {
            "aggregation": LossAggregation.sequence,
            "dual_clip": None if importance in (ImportanceKind.dis, ImportanceKind.m2po) else 1.3,
        },
    )
]
"""Every importance kind with every mismatch correction, both aggregations, with and without dual clip."""

# Three tokens of one response: pi_theta, pi_prox, pi_behav; m = prox/behav = 0.5, 2, 1; r = theta/prox = 1, 1.5, 0.5;
# rho = theta/behav = 0.5, 3, 0.5. Advantages 1, 2, -3. Clip range [0.8, 1.28] where nothing else is said.
THETA, PROX, BEHAV = [0.2, 0.6, 0.25], [0.2, 0.4, 0.5], [0.4, 0.2, 0.5]
PER_TOKEN = ("mask", "advantage", "sample_log_prob", "prox_log_prob", "ref_log_prob", "age", "correct")


def named(variant: dict[str, Any]) -> str:
    """A variant as a test's name."""
    return "-".join(str(getattr(x, "value", x)) for x in variant.values())


def three_tokens(advantage: list[float]) -> Batch:
    """The three tokens above as a batch, float64."""

    def log(x: list[float]) -> Tensor:
        return torch.tensor([x], dtype=torch.float64).log()

    return {
        "log_prob": log(THETA).requires_grad_(),
        "entropy": torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64).requires_grad_(),
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "advantage": torch.tensor([advantage], dtype=torch.float64),
        "sample_log_prob": log(BEHAV),
        "prox_log_prob": log(PROX),
        "ref_log_prob": log([0.1, 0.6, 0.5]),
        "age": torch.tensor([[0, 1, 3]]),
        "correct": torch.tensor([True]),
    }


def make_batch(rows: int = 8, width: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Rows with padding on both sides and a hole in some, NaN outside the mask; what has a gradient is a leaf."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 3, (rows, 1), generator=generator)
    ends = torch.randint(3, width + 1, (rows, 1), generator=generator)
    holes = torch.randint(0, width, (rows, 1), generator=generator)
    t = torch.arange(width)
    mask = (t >= starts) & (t < ends) & ((t != holes) | (t == ends - 1))

    def draw(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = scale * torch.randn(rows, width, generator=generator, dtype=torch.float64) + shift
        return x.where(mask, NAN).to(dtype)

    log_probs = ("log_prob", "sample_log_prob", "prox_log_prob", "ref_log_prob")
    batch = {name: draw(0.4, -1.5) for name in log_probs}
    batch |= {name: draw() for name in ("entropy", "advantage", "value", "value_target", "old_value")}
    batch["age"] = torch.randint(0, 5, (rows, width), generator=generator).where(mask, -1)
    batch |= {"mask": mask, "correct": torch.rand(rows, generator=generator) < 0.5}
    return {k: v.requires_grad_() if k in ("log_prob", "entropy", "value") else v for k, v in batch.items()}


def terms_of(
    batch: Batch, settings: PolicySettings, denominators: Denominators | None = None, **changed: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``policy_terms`` of a batch, by itself unless ``denominators`` are given."""
    given: dict[str, Any] = {key: batch[key] for key in PER_TOKEN} | {"keep": batch.get("keep")} | changed
    if denominators is None:
        denominators = denominators_of(batch["mask"], batch["correct"])
    return policy_terms(batch["log_prob"], batch["entropy"], **given, settings=settings, denominators=denominators)


def loss_and_gradient(batch: Batch, settings: PolicySettings, **changed: Any) -> tuple[Tensor, Tensor]:
    """The sum of the terms, and its gradient by ``log_prob``."""
    losses, _ = terms_of(batch, settings, **changed)
    total = torch.stack(list(losses.values())).sum()
    return total.detach(), torch.autograd.grad(total, batch["log_prob"])[0]


def oracle(theta: list[list[float]], batch: Batch, s: PolicySettings) -> float:
    """The policy's loss, token by token in Python floats; constants are computed from the batch's own ``log_prob``.

    ``theta``: log π_θ where the gradient flows. A numerical derivative by it leaves the constants alone.
    """
    mask, correct = batch["mask"].tolist(), batch["correct"].tolist()
    b = {k: batch[k].tolist() for k in (*PER_TOKEN, "log_prob", "entropy")}
    low, high = float(s.clip_low), float(s.clip_high)
    places = [(i, t) for i, row in enumerate(mask) for t, inside in enumerate(row) if inside]
    dropped = _m2po_dropped(b, places, float(s.m2po_threshold)) if s.importance is ImportanceKind.m2po else set()
    per_row: dict[int, list[float]] = {}
    nll = kl = 0.0
    extra: dict[int, list[float]] = {}
    for i, t in places:
        advantage, behav, prox, frozen = (
            b[k][i][t] for k in ("advantage", "sample_log_prob", "prox_log_prob", "log_prob")
        )
        m = math.exp(prox - behav)
        keep = (i, t) not in dropped
        match s.mismatch:
            case MismatchKind.tis:
                behav = prox - math.log(min(m, s.mismatch_high))
            case MismatchKind.icepop:
                keep &= s.mismatch_low <= m <= s.mismatch_high
            case MismatchKind.mis:
                row = [u for j, u in places if j == i]
                mean = sum(b["prox_log_prob"][i][u] - b["sample_log_prob"][i][u] for u in row) / len(row)
                keep &= s.mismatch_low <= math.exp(mean) <= s.mismatch_high
        centre, weight = behav, 1.0
        if s.importance is ImportanceKind.decoupled:
            centre = prox
        if s.importance is ImportanceKind.a3po:
            d = b["age"][i][t]
            centre = (behav + d * frozen) / (d + 1)
        if s.importance in (ImportanceKind.decoupled, ImportanceKind.a3po):
            cap = math.inf if s.behaviour_weight_cap is None else float(s.behaviour_weight_cap)
            weight = min(math.exp(centre - behav), cap)
        x = theta[i][t]
        ratio = math.exp(x - centre)
        if s.importance is ImportanceKind.dis:
            constant = math.exp(frozen - behav)
            gain = constant * advantage * x if 1 - low < constant < 1 + high else 0.0
        elif s.importance is ImportanceKind.m2po:
            gain = ratio * advantage
        else:
            gain = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            if s.dual_clip is not None and advantage < 0:
                gain = max(gain, float(s.dual_clip) * advantage)
        per_row.setdefault(i, []).append(-weight * gain if keep else 0.0)
        nll -= x if correct[i] else 0.0
        to_reference = b["ref_log_prob"][i][t] - x
        kl = math.exp(to_reference) - 1 - to_reference
        entropy_coef, kl_coef = float(s.entropy_coef or 0), float(s.kl_coef or 0)
        extra.setdefault(i, []).append(kl_coef * kl - entropy_coef * b["entropy"][i][t])
    rows = [[x + y for x, y in zip(per_row[i], extra[i], strict=True)] for i in per_row]
    if s.aggregation is LossAggregation.token:
        loss = sum(map(sum, rows)) / len(places)
    else:
        loss = sum(sum(row) / len(row) for row in rows) / len(rows)
    positive = sum(1 for i, _ in places if correct[i])
    return loss + float(s.nll_coef or 0) * nll / max(positive, 1)


def _m2po_dropped(b: dict[str, Any], places: list[tuple[int, int]], threshold: float) -> set[tuple[int, int]]:
    log_ratio = {p: b["log_prob"][p[0]][p[1]] - b["sample_log_prob"][p[0]][p[1]] for p in places}
    harmful = [p for p in places if b["advantage"][p[0]][p[1]] * log_ratio[p] > 0]
    harmful.sort(key=lambda p: -(log_ratio[p] ** 2))
    left, dropped = list(places), set()
    for p in harmful:
        if sum(log_ratio[q] ** 2 for q in left) < threshold * len(left):
            break
        left.remove(p)
        dropped.add(p)
    return dropped
