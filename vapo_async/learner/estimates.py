"""Advantages and value targets of a whole batch, computed once, before any whitening."""

from torch import Tensor

from vapo_async.config.algorithm import AdvantageKind, AlgorithmConfig, ValueTargetKind
from vapo_async.learner.batch import LearnerBatch
from vapo_async.objectives.advantage import (
    generalized_advantage,
    group_advantage,
    length_adaptive_lambda,
    value_targets,
    vtrace_targets,
)
from vapo_async.objectives.statistics import whiten


def write_advantages(batch: LearnerBatch, algorithm: AlgorithmConfig) -> None:
    """``batch.advantage`` from the critic's values (GAE) or the group's rewards; see docs/methods.md."""
    a = algorithm
    match a.advantage:
        case AdvantageKind.group:
            batch.advantage = group_advantage(batch.reward.sum(1), batch.group_id, batch.mask)
        case AdvantageKind.gae:
            lmbda: Tensor | float = a.lmbda
            if a.length_adaptive:
                lmbda = length_adaptive_lambda(batch.response_lengths, a.alpha)
            batch.advantage = generalized_advantage(batch.state_value, batch.reward, batch.mask, a.gamma, lmbda)
            if a.whiten_advantage:
                batch.advantage = whiten(batch.advantage, batch.trained)


def write_value_targets(batch: LearnerBatch, algorithm: AlgorithmConfig, *, pretraining: bool) -> None:
    """``batch.value_target``: λ-returns or V-trace targets; Monte-Carlo returns (λ = 1) in value pretraining."""
    a = algorithm
    values = batch.state_value, batch.reward, batch.mask, a.gamma
    if pretraining or a.value_target is ValueTargetKind.lambda_return:
        batch.value_target = value_targets(*values, 1.0 if pretraining else a.lmbda_critic)
    else:
        log_ratio = batch.prox_log_prob - batch.sample_log_prob
        batch.value_target = vtrace_targets(*values, a.lmbda_critic, log_ratio, a.vtrace_rho_cap, a.vtrace_c_cap)
