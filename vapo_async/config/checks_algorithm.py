"""Ranges and contradictions of ``algorithm``."""

from vapo_async.config.algorithm import AdvantageKind, AlgorithmConfig, ImportanceKind, ValueTargetKind
from vapo_async.config.requirements import above, at_least, require, within


def check_algorithm(c: AlgorithmConfig) -> None:
    """By itself; what the task's lengths ask of it is with :func:`.checks.check_config`."""
    at_least("algorithm.groups_per_batch", c.groups_per_batch, 1)
    at_least("algorithm.group_size", c.group_size, 1)
    if not c.group_sampling:
        hint = "without groups nothing compares responses to one prompt"
        gae = c.advantage is AdvantageKind.gae and not c.dynamic_sampling
        expected = "true with algorithm.advantage=group or algorithm.dynamic_sampling=true"
        require(gae, "algorithm.group_sampling", c.group_sampling, expected, hint)
    if c.advantage is AdvantageKind.group:
        hint = "one response has no group to be compared with; take more, or algorithm.advantage=gae"
        require(c.group_size >= 2, "algorithm.group_size", c.group_size, "≥ 2 with algorithm.advantage=group", hint)
        steps = c.value_pretraining_steps
        hint = "group advantages build no critic that could be pretrained"
        require(steps == 0, "algorithm.value_pretraining_steps", steps, "0 with algorithm.advantage=group", hint)
    responses = c.groups_per_batch * c.group_size
    at_least("algorithm.minibatches", c.minibatches, 1)
    bound = f"≤ groups_per_batch · group_size = {responses}"
    require(c.minibatches <= responses, "algorithm.minibatches", c.minibatches, bound, "a mini-batch needs a response")
    at_least("algorithm.epochs", c.epochs, 1)
    at_least("algorithm.value_pretraining_steps", c.value_pretraining_steps, 0, "0 turns it off")
    within("algorithm.gamma", c.gamma, 0, 1)
    within("algorithm.lmbda_critic", c.lmbda_critic, 0, 1)
    within("algorithm.lmbda", c.lmbda, 0, 1)
    above("algorithm.alpha", c.alpha, 0, "λ = 1 − 1/(alpha·l); algorithm.length_adaptive=false turns it off")
    hint = "the papers have 0.2 (DIS 0.3); ratios below 1 − clip_low are clipped, and none is below 0"
    require(0 < c.clip_low < 1, "algorithm.clip_low", c.clip_low, "in (0, 1)", hint)
    above("algorithm.clip_high", c.clip_high, 0, "the papers have 0.28 (PPO 0.2, DIS 5.0)")
    at_least("algorithm.nll_coef", c.nll_coef, 0, "0 turns the positive-example loss off")
    if c.behaviour_weight_cap is not None:
        hint = "a cap below 1 scales even on-policy tokens down; null = none"
        at_least("algorithm.behaviour_weight_cap", c.behaviour_weight_cap, 1, hint)
    above("algorithm.m2po_threshold", c.m2po_threshold, 0, "the paper has 0.04")
    hint = "an engine that agrees with the learner has the ratio 1"
    require(0 <= c.mismatch_low < 1, "algorithm.mismatch_low", c.mismatch_low, "in [0, 1)", hint)
    above("algorithm.mismatch_high", c.mismatch_high, 1, hint)
    if c.dual_clip is not None:
        above("algorithm.dual_clip", c.dual_clip, 1, "null turns it off")
        plain = c.importance in (ImportanceKind.naive, ImportanceKind.decoupled, ImportanceKind.a3po)
        expected = f"null with algorithm.importance={c.importance.value}"
        require(plain, "algorithm.dual_clip", c.dual_clip, expected, "that objective has no clip to bound")
    hint = "the share of task.max_response_tokens that the punishment's ramp covers; 0 turns it off"
    require(0 <= c.overlong_cache < 1, "algorithm.overlong_cache", c.overlong_cache, "in [0, 1)", hint)
    at_least("algorithm.kl_coef", c.kl_coef, 0, "0 turns the KL off")
    at_least("algorithm.dynamic_sampling_patience", c.dynamic_sampling_patience, 1)
    if c.dynamic_sampling:
        hint = "one response is always all right or all wrong"
        expected = "≥ 2 with algorithm.dynamic_sampling=true"
        require(c.group_size >= 2, "algorithm.group_size", c.group_size, expected, hint)
    above("algorithm.vtrace_rho_cap", c.vtrace_rho_cap, 0, "the paper has 1")
    above("algorithm.vtrace_c_cap", c.vtrace_c_cap, 0, "the paper has 1")
    if c.value_target is ValueTargetKind.vtrace:
        hint = "group advantages have no critic"
        gae = c.advantage is AdvantageKind.gae
        require(gae, "algorithm.value_target", "vtrace", "lambda_return with algorithm.advantage=group", hint)
    at_least("algorithm.critic_updates", c.critic_updates, 1)
    if c.value_clip is not None:
        above("algorithm.value_clip", c.value_clip, 0, "null turns it off")
    at_least("algorithm.entropy_coef", c.entropy_coef, 0, "0 turns the bonus off")
    at_least("algorithm.policy_lr", c.policy_lr, 0)
    at_least("algorithm.critic_lr", c.critic_lr, 0)
    at_least("algorithm.lr_warmup_steps", c.lr_warmup_steps, 0)
    at_least("algorithm.weight_decay", c.weight_decay, 0)
    above("algorithm.max_grad_norm", c.max_grad_norm, 0, "a large number, 1e9, turns clipping off")
