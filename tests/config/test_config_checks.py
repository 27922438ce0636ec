"""Ranges and contradictions are refused with the key, the value found and the one expected."""

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.config import Config, ConfigError
from vapo_async.config.checks import check_config
from vapo_async.config.load import load_config

REFUSED = [
    ("buffer.max_staleness=-1", "buffer.max_staleness must be ≥ 0, found -1"),
    ("buffer.lead=5 buffer.max_staleness=4", "buffer.lead must be between 0 and buffer.max_staleness = 4, found 5"),
    ("buffer.lead=-1", "buffer.lead must be between 0"),
    (
        "algorithm.groups_per_batch=8 buffer.capacity=7",
        "buffer.capacity must be ≥ algorithm.groups_per_batch = 8, found 7: capacity ≥ groups_per_batch: with less no "
        "batch is ever full",
    ),
    ("buffer.max_running=0", "buffer.max_running must be ≥ 1, found 0"),
    ("buffer.straggler_timeout_s=0", "buffer.straggler_timeout_s must be > 0"),
    ("buffer.on_straggler=drop buffer.max_drops=-1", "buffer.max_drops must be ≥ 0, found -1"),
    ("buffer.on_straggler=kill", "buffer.on_straggler must be one of wait, drop, found 'kill'"),
    (
        "buffer.on_straggler=drop buffer.straggler_timeout_s=600",
        "buffer.straggler_timeout_s must be < launcher.stage_timeout_s = 600, found 600.0",
    ),
    (
        "launcher.stage_timeout_s=100 launcher.engine_timeout_s=100",
        "launcher.engine_timeout_s must be < launcher.stage_timeout_s = 100, found 100.0",
    ),
    ("launcher.stage_timeout_s=5 verifier.timeout_s=5", "verifier.timeout_s must be < launcher.stage_timeout_s = 5"),
    ("launcher.engine_timeout_s=0", "launcher.engine_timeout_s must be > 0"),
    ("launcher=ray learner=deepspeed learner.ranks=0", "learner.ranks must be ≥ 1, found 0"),
    ("launcher=ray learner=deepspeed learner.zero_stage=4", "learner.zero_stage must be 1, 2 or 3, found 4"),
    ("launcher=ray learner=deepspeed learner.offload_parameters=true", "must be false below learner.zero_stage=3"),
    ("launcher=inline learner=deepspeed", "launcher must be ray with learner=deepspeed, found 'inline'"),
    (
        "launcher=ray learner=deepspeed learner.ranks=1 learner.device=cuda:1",
        "learner.device must be cpu or cuda with learner=deepspeed, found 'cuda:1': Ray says which GPU a rank sees: "
        "leave the number out",
    ),
    (
        "launcher=ray learner=deepspeed learner.ranks=2 learner.device=cuda launcher.gpus_per_actor=0.5",
        "launcher.gpus_per_actor must be ≥ 1 with learner.device=cuda learner.ranks=2, found 0.5: NCCL refuses two "
        "ranks on one GPU; raise it, or learner.ranks=1",
    ),
    ("launcher.max_restarts=-1", "launcher.max_restarts must be ≥ 0, found -1"),
    ("launcher=inline launcher.overlap_steps=-1", "launcher.overlap_steps must be ≥ 0, found -1"),
    ("launcher=inline launcher.replay=''", "launcher.replay must be the path of a schedule.jsonl or null, found ''"),
    ("algorithm.group_size=0", "algorithm.group_size must be ≥ 1, found 0"),
    (
        "algorithm.advantage=group algorithm.value_pretraining_steps=0 algorithm.group_size=1",
        "algorithm.group_size must be ≥ 2 with algorithm.advantage=group, found 1",
    ),
    (
        "algorithm.advantage=group",
        "algorithm.value_pretraining_steps must be 0 with algorithm.advantage=group, found 40",
    ),
    ("algorithm.groups_per_batch=2 algorithm.group_size=2 algorithm.minibatches=5", "algorithm.minibatches must be ≤"),
    ("algorithm.minibatches=0", "algorithm.minibatches must be ≥ 1"),
    ("algorithm.epochs=0", "algorithm.epochs must be ≥ 1"),
    ("algorithm.alpha=0", "algorithm.alpha must be > 0, found 0.0"),
    ("algorithm.alpha=nan", "algorithm.alpha must be > 0, found nan"),
    ("algorithm.lmbda=1.1", "algorithm.lmbda must be between 0 and 1, found 1.1"),
    ("algorithm.lmbda_critic=-0.1", "algorithm.lmbda_critic must be between 0 and 1"),
    ("algorithm.gamma=2", "algorithm.gamma must be between 0 and 1"),
    ("algorithm.clip_low=1", "algorithm.clip_low must be in (0, 1), found 1.0"),
    ("algorithm.clip_low=0", "algorithm.clip_low must be in (0, 1), found 0.0"),
    ("algorithm.clip_high=0", "algorithm.clip_high must be > 0"),
    ("algorithm.behaviour_weight_cap=0.5", "algorithm.behaviour_weight_cap must be ≥ 1, found 0.5"),
    ("algorithm.nll_coef=-1", "algorithm.nll_coef must be ≥ 0"),
    ("algorithm.critic_updates=0", "algorithm.critic_updates must be ≥ 1"),
    ("algorithm.value_clip=0", "algorithm.value_clip must be > 0"),
    ("algorithm.entropy_coef=-1", "algorithm.entropy_coef must be ≥ 0, found -1.0"),
    ("algorithm.overlong_cache=0.001", "algorithm.overlong_cache must be 0 or ≥ 1/128, found 0.001"),
    ("launcher.evaluation_timeout_s=0", "launcher.evaluation_timeout_s must be > 0"),
    ("algorithm.policy_lr=-1e-6", "algorithm.policy_lr must be ≥ 0"),
    ("algorithm.critic_lr=inf", "algorithm.critic_lr must be ≥ 0"),
    ("algorithm.max_grad_norm=0", "algorithm.max_grad_norm must be > 0"),
    ("task.template=hello", "task.template must be text that holds {question}, found 'hello'"),
    ("task.max_response_tokens=0", "task.max_response_tokens must be ≥ 1"),
    ("algorithm.overlong_cache=1", "algorithm.overlong_cache must be in [0, 1), found 1.0"),
    ("algorithm.importance=ppo", "algorithm.importance must be one of naive, decoupled, a3po, dis, m2po, found 'ppo'"),
    ("algorithm.mismatch_low=1", "algorithm.mismatch_low must be in [0, 1), found 1.0"),
    ("algorithm.mismatch_high=1", "algorithm.mismatch_high must be > 1, found 1.0"),
    ("algorithm.m2po_threshold=0", "algorithm.m2po_threshold must be > 0, found 0.0"),
    ("algorithm.dual_clip=1", "algorithm.dual_clip must be > 1, found 1.0"),
    (
        "algorithm.importance=dis algorithm.dual_clip=3",
        "algorithm.dual_clip must be null with algorithm.importance=dis, found 3.0",
    ),
    ("algorithm.kl_coef=-1", "algorithm.kl_coef must be ≥ 0, found -1.0"),
    (
        "algorithm.dynamic_sampling=true algorithm.group_size=1",
        "algorithm.group_size must be ≥ 2 with algorithm.dynamic_sampling=true, found 1",
    ),
    ("algorithm.dynamic_sampling_patience=0", "algorithm.dynamic_sampling_patience must be ≥ 1"),
    ("algorithm.vtrace_rho_cap=0", "algorithm.vtrace_rho_cap must be > 0"),
    (
        "algorithm.advantage=group algorithm.value_pretraining_steps=0 algorithm.value_target=vtrace",
        "algorithm.value_target must be lambda_return with algorithm.advantage=group, found 'vtrace'",
    ),
    ("task.reward_correct=-1", "task.reward_correct must be > task.reward_wrong = -1.0, found -1.0"),
    ("task.min_terms=13", "task.min_terms must be ≤ task.max_terms = 12, found 13"),
    ("task.min_digits=0", "task.min_digits must be ≥ 1"),
    ("task=gsm8k task.train=", "task.train must be a file's path or the name of a data set, found ''"),
    ("model.dtype=int8", "model.dtype must be one of float32, bfloat16, float16, found 'int8'"),
    ("model.num_heads=3", "model.hidden_size must be a multiple of 2·num_heads = 6, found 64"),
    ("model.habit_sign_rate=1.5", "model.habit_sign_rate must be between 0 and 1"),
    ("engine.top_p=0.9", "engine.top_p must be 1, found 0.9: the learner cannot rebuild"),
    ("engine.temperature=0", "engine.temperature must be > 0"),
    ("engine.max_slots=0", "engine.max_slots must be ≥ 1"),
    ("learner.max_tokens_per_microbatch=100", "learner.max_tokens_per_microbatch must be ≥ task.max_prompt_tokens"),
    ("learner.device=gpu", "learner.device must be cpu, cuda or cuda:<n>, found 'gpu'"),
    ("engine.device=mps", "engine.device must be cpu, cuda or cuda:<n>, found 'mps'"),
    ("launcher.port=0", "launcher.port must be between 1 and 65535, found 0"),
    ("launcher.port=6379 launcher.address=auto", "launcher.port must be null with launcher.address=auto, found 6379"),
    ("launcher.rollout_workers=0", "launcher.rollout_workers must be ≥ 1"),
    ("launcher.stage_timeout_s=0", "launcher.stage_timeout_s must be > 0"),
    ("verifier.timeout_s=-1", "verifier.timeout_s must be > 0"),
    ("verifier.workers=0", "verifier.workers must be ≥ 1"),
    ("verifier.memory_mb=511", "verifier.memory_mb must be ≥ 512, found 511"),
    ("evaluation.samples=0", "evaluation.samples must be ≥ 1"),
    ("evaluation.problems=257", "evaluation.problems must be ≤ task.heldout_problems = 256, found 257"),
    ("evaluation.every=-1", "evaluation.every must be ≥ 0"),
    ("evaluation.top_p=0", "evaluation.top_p must be in (0, 1], found 0.0: 1 samples from all tokens"),
    ("evaluation.top_p=1.1", "evaluation.top_p must be in (0, 1], found 1.1"),
    ("evaluation.top_p=nan", "evaluation.top_p must be in (0, 1], found nan"),
    ("checkpoint.keep=0", "checkpoint.keep must be ≥ 1"),
    ("steps=-1", "steps must be ≥ 0"),
    ("seed=-1", "seed must be ≥ 0"),
    ("name=a/b", "name must be letters"),
    ("name=..", "name must be letters"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_config_value_out_of_range_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "algorithm.policy_lr=0 algorithm.critic_lr=0",
        "buffer.max_staleness=0 launcher=inline",
        "buffer.max_staleness=4 buffer.lead=4",
        "algorithm.advantage=group algorithm.value_pretraining_steps=0",
        "algorithm.lmbda=0 algorithm.lmbda_critic=0 algorithm.epochs=3 algorithm.minibatches=256",
        "algorithm.overlong_cache=0.99 algorithm.dual_clip=1.01 algorithm.mismatch_low=0",
        "launcher.port=65535",
        "algorithm.clip_low=0.99 engine.device=cuda:1 verifier.memory_mb=512",
        "evaluation.every=0",
        "launcher=ray learner=torch learner.device=cuda:1",
        "launcher=ray learner=deepspeed learner.ranks=2 learner.device=cuda",
        "launcher=ray learner=deepspeed learner.ranks=1 learner.device=cuda launcher.gpus_per_actor=0.5",
        "launcher=ray learner=deepspeed learner.ranks=2 engine.device=cuda launcher.gpus_per_actor=0.5",
    ],
)
def test_config_value_at_the_edge_is_taken(line: str) -> None:
    load_config(line.split())


DEFAULT = load_config([])


def _accepted(config: Config) -> bool:
    try:
        check_config(config)
    except ConfigError as error:
        assert "\n" not in str(error)
        return False
    return True


@given(staleness=st.integers(-3, 10), lead=st.none() | st.integers(-3, 12))
def test_config_buffer_is_taken_exactly_when_the_lead_keeps_the_bound(staleness: int, lead: int | None) -> None:
    config = _fresh()
    config.buffer.max_staleness, config.buffer.lead = staleness, lead
    assert _accepted(config) == (staleness >= 0 and (lead is None or 0 <= lead <= staleness))


@given(alpha=st.floats(), lmbda=st.floats(-2, 2), cap=st.none() | st.floats())
def test_config_numbers_are_taken_exactly_in_their_ranges(alpha: float, lmbda: float, cap: float | None) -> None:
    config = _fresh()
    config.algorithm.alpha, config.algorithm.lmbda, config.algorithm.behaviour_weight_cap = alpha, lmbda, cap
    fine = 0 < alpha < math.inf and 0 <= lmbda <= 1 and (cap is None or 1 <= cap < math.inf)
    assert _accepted(config) == fine


def _fresh() -> Config:
    """A fresh default: composing it anew for every example would be slow."""
    return copy.deepcopy(DEFAULT)
