"""What the learner does with lag, references and filters: each against the pure functions or against itself."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from test_learner_learner import ALGORITHM, make_batch, make_learner, weights

from vapo_async.config.algorithm import (
    AdvantageKind,
    AlgorithmConfig,
    ImportanceKind,
    LossAggregation,
    MismatchKind,
    ValueTargetKind,
)
from vapo_async.learner.batch import LearnerBatch
from vapo_async.learner.estimates import write_value_targets
from vapo_async.schema import FinishReason

VERSION = 5


def lagged(seed: int = 0) -> list[TensorDict]:
    """Tokens of versions 0 … 5: half of the responses crossed a publication."""
    batch = make_batch(seed)
    for i, trajectory in enumerate(batch):
        versions = trajectory["policy_version"]
        versions[len(versions) // 2 :] = VERSION - i % 4
        versions[: len(versions) // 2] = VERSION - 2 * (i % 3) - i % 2
    return batch


def truncate(batch: list[TensorDict], rows: list[int]) -> None:
    for row in rows:
        batch[row]["finish_reason"] = torch.tensor(int(FinishReason.LENGTH), dtype=torch.int8)


def moved(algorithm: AlgorithmConfig, batch: list[TensorDict]) -> dict[str, torch.Tensor]:
    learner = make_learner(algorithm)
    learner.update(batch, VERSION)
    return weights(learner)


@pytest.mark.parametrize(
    "change",
    [
        {"importance": ImportanceKind.a3po},
        {"importance": ImportanceKind.dis},
        {"importance": ImportanceKind.m2po},
        {"mismatch": MismatchKind.tis, "mismatch_high": 1.1},
        {"mismatch": MismatchKind.icepop, "mismatch_low": 0.9, "mismatch_high": 1.1},
        {"mismatch": MismatchKind.mis, "mismatch_low": 0.9, "mismatch_high": 1.1},
        {"value_target": ValueTargetKind.vtrace, "gamma": 0.99},
        {"overlong_filter": True},
        {"dual_clip": 1.01},
        {"value_clip": 1e-3},
        {"critic_updates": 2},
        {"behaviour_weight_cap": 1.0},
        {"aggregation": LossAggregation.sequence},
        {"whiten_advantage": False},
        {"entropy_coef": 0.1},
        {"kl_coef": 1.0},
        {"nll_coef": 0.0},
        {"lmbda_critic": 0.5},
        {"length_adaptive": False},
    ],
    ids=lambda change: "-".join(getattr(v, "value", k) for k, v in change.items()),
)
def test_each_choice_changes_what_is_learned(change: dict[str, object]) -> None:
    """No switch is without a wire: the weights after one batch differ from the default's."""
    batch = lagged()
    truncate(batch, [0, 5])
    changed, plain = (
        dataclasses.replace(ALGORITHM, **change),
        dataclasses.replace(ALGORITHM, gamma=change.get("gamma", 1)),
    )
    a, b = moved(changed, batch), moved(plain, batch)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_response_that_the_overlong_filter_drops_leaves_no_trace() -> None:
    """Its reward and its log-probs can be anything; the denominators are those of the others."""
    algorithm = dataclasses.replace(ALGORITHM, overlong_filter=True, minibatches=1)
    one, other = lagged(), lagged()
    for batch in (one, other):
        truncate(batch, [2, 7])
    for row in (2, 7):
        other[row]["reward"] = other[row]["reward"] * 3 + 1
        other[row]["sample_log_prob"] = other[row]["sample_log_prob"] - 0.5
    a, b = moved(algorithm, one), moved(algorithm, other)
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = dataclasses.replace(algorithm, overlong_filter=False)
    a, b = moved(plain, one), moved(plain, other)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_batch_of_nothing_but_overlong_responses_changes_nothing() -> None:
    """Not even AdamW's momentum moves: no optimizer steps on nothing."""
    learner = make_learner(dataclasses.replace(ALGORITHM, overlong_filter=True))
    learner.update(lagged(), VERSION)
    batch = lagged(1)
    truncate(batch, list(range(len(batch))))
    before = weights(learner)
    result = learner.update(batch, VERSION)
    after = weights(learner)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (result.tokens, result.policy_steps, result.critic_steps) == (0, 0, 0)
    assert "loss_objective" not in result.metrics


def test_the_kl_pulls_back_to_the_first_policy() -> None:
    """The reference stays where training began: the KL starts at 0 and a large β keeps it small."""

    def kl(beta: float) -> list[float]:
        algorithm = dataclasses.replace(ALGORITHM, advantage=AdvantageKind.group, nll_coef=0.0, kl_coef=beta)
        learner = make_learner(algorithm)
        return [learner.update(make_batch(seed), 0).metrics["kl"] for seed in range(6)]

    weak, strong = kl(1e-6), kl(5.0)
    assert weak[0] < 0.1 * weak[-1], "the policy moves away"
    assert strong[-1] < 0.5 * weak[-1]
    assert "kl" not in make_learner().update(make_batch(), 0).metrics


def test_a3po_saves_the_pass_for_the_proximal_policy() -> None:
    """Tokens of weights that are no longer there: none of them is compared with the engine."""
    passes: dict[ImportanceKind, int] = {}
    for importance in (ImportanceKind.decoupled, ImportanceKind.a3po):
        learner = make_learner(dataclasses.replace(ALGORITHM, importance=importance))
        for i in range(2):
            learner.update(lagged(i), VERSION + i)
        count = [0]
        learner.policy.get_decoder().register_forward_hook(_counter(count))
        result = learner.update(lagged(2), VERSION + 2)
        passes[importance] = count[0]
        assert "entropy" in result.metrics
        assert result.metrics["engine_mismatch_tokens"] == 0
    assert passes[ImportanceKind.a3po] == passes[ImportanceKind.decoupled] - 1


def _counter(count: list[int]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        count[0] += 1

    return hook


def test_vtrace_targets_are_monte_carlo_returns_where_nothing_lags() -> None:
    """Ratios of 1: V-trace at λ = γ = 1 is the return; pretraining takes the return in any case."""
    algorithm = dataclasses.replace(ALGORITHM, value_target=ValueTargetKind.vtrace)
    batch = LearnerBatch.from_trajectories(lagged(), torch.device("cpu"), VERSION)
    torch.manual_seed(0)
    batch.state_value = torch.randn_like(batch.state_value)
    returns = torch.where(batch.mask, batch.reward.sum(1, keepdim=True), 0.0)
    batch.prox_log_prob = batch.sample_log_prob.clone()
    write_value_targets(batch, algorithm, pretraining=False)
    torch.testing.assert_close(batch.value_target, returns, atol=1e-5, rtol=0)
    batch.prox_log_prob = batch.sample_log_prob - 0.7
    write_value_targets(batch, algorithm, pretraining=False)
    assert (batch.value_target - returns)[batch.mask].abs().max() > 0.1
    write_value_targets(batch, algorithm, pretraining=True)
    torch.testing.assert_close(batch.value_target, returns, atol=1e-6, rtol=0)


def test_explained_variance_is_told_by_age_and_length() -> None:
    learner = make_learner(dataclasses.replace(ALGORITHM, value_pretraining_steps=1))
    metrics = learner.update(lagged(), VERSION).metrics
    ages = {key for key in metrics if key.startswith("explained_variance_age")}
    assert ages == {f"explained_variance_age_from_{age}" for age in (0, 1, 2, 4)}
    assert {key for key in metrics if key.startswith("explained_variance_length")} == {
        "explained_variance_length_from_0"
    }
