"""Ranges and contradictions: what the types of the configuration cannot say.

Pure functions of the configuration. The first violation raises a :class:`~vapo_async.config.ConfigError` of one line:
key, what it must be, what was found, what to do. Comparisons are written so that NaN fails them.
"""

import math
import re

from vapo_async.config.algorithm import AdvantageKind, AlgorithmConfig, ImportanceKind, ValueTargetKind
from vapo_async.config.engine import EngineConfig, VLLMEngineConfig, WeightTransport
from vapo_async.config.errors import ConfigError
from vapo_async.config.launcher import InlineLauncherConfig, LauncherConfig, RayLauncherConfig
from vapo_async.config.learner import DeepSpeedLearnerConfig, LearnerConfig
from vapo_async.config.model import EmbeddedModelConfig, FolderModelConfig, ModelConfig, WarmStartModelConfig
from vapo_async.config.task import ChainSumTaskConfig, DatasetTaskConfig, TaskConfig
from vapo_async.config.tree import BufferConfig, Config, EvaluationConfig, OnStraggler, VerifierConfig


def check_config(config: Config) -> None:
    """Raises :class:`ConfigError` for the first value that is out of range or contradicts another."""
    _run(config)
    _algorithm(config.algorithm)
    _task(config.task)
    _model(config.model)
    _warm_start(config)
    _engine(config.engine)
    _learner(config.learner, config.task)
    cache, longest = config.algorithm.overlong_cache, config.task.max_response_tokens
    hint = f"less is not a token of task.max_response_tokens = {longest}; 0 turns the punishment off"
    _require(cache == 0 or cache * longest >= 1, "algorithm.overlong_cache", cache, f"0 or ≥ 1/{longest}", hint)
    _launcher(config.launcher)
    _engine_in_place(config)
    _learner_in_place(config)
    _buffer(config.buffer, config.algorithm)
    _time_limits(config)
    _verifier(config.verifier)
    _evaluation(config.evaluation, config.task)
    _at_least("checkpoint.every", config.checkpoint.every, 0, "0 writes one only at the end and on Ctrl-C")
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    if config.logging.wandb or config.logging.trackio:
        _require(config.logging.project.strip() != "", "logging.project", config.logging.project, "not empty")


def _run(c: Config) -> None:
    plain = re.fullmatch(r"[\w.-]+", c.name) is not None and c.name.strip(".") != ""
    _require(plain, "name", c.name, "letters, digits, '-', '_' or '.'", "it names a folder in runs_dir")
    _at_least("seed", c.seed, 0)
    _at_least("steps", c.steps, 0)
    _require(c.runs_dir != "", "runs_dir", c.runs_dir, "a folder's path")
    _require(c.resume != "", "resume", c.resume, "never, auto or the path of a run folder")


def _algorithm(c: AlgorithmConfig) -> None:
    _at_least("algorithm.groups_per_batch", c.groups_per_batch, 1)
    _at_least("algorithm.group_size", c.group_size, 1)
    if not c.group_sampling:
        hint = "without groups nothing compares responses to one prompt"
        gae = c.advantage is AdvantageKind.gae and not c.dynamic_sampling
        expected = "true with algorithm.advantage=group or algorithm.dynamic_sampling=true"
        _require(gae, "algorithm.group_sampling", c.group_sampling, expected, hint)
    if c.advantage is AdvantageKind.group:
        hint = "one response has no group to be compared with; take more, or algorithm.advantage=gae"
        _require(c.group_size >= 2, "algorithm.group_size", c.group_size, "≥ 2 with algorithm.advantage=group", hint)
        steps = c.value_pretraining_steps
        hint = "group advantages build no critic that could be pretrained"
        _require(steps == 0, "algorithm.value_pretraining_steps", steps, "0 with algorithm.advantage=group", hint)
    responses = c.groups_per_batch * c.group_size
    _at_least("algorithm.minibatches", c.minibatches, 1)
    bound = f"≤ groups_per_batch · group_size = {responses}"
    _require(c.minibatches <= responses, "algorithm.minibatches", c.minibatches, bound, "a mini-batch needs a response")
    _at_least("algorithm.epochs", c.epochs, 1)
    _at_least("algorithm.value_pretraining_steps", c.value_pretraining_steps, 0, "0 turns it off")
    _within("algorithm.gamma", c.gamma, 0, 1)
    _within("algorithm.lmbda_critic", c.lmbda_critic, 0, 1)
    _within("algorithm.lmbda", c.lmbda, 0, 1)
    _above("algorithm.alpha", c.alpha, 0, "λ = 1 − 1/(alpha·l); algorithm.length_adaptive=false turns it off")
    hint = "the papers have 0.2 (DIS 0.3); ratios below 1 − clip_low are clipped, and none is below 0"
    _require(0 < c.clip_low < 1, "algorithm.clip_low", c.clip_low, "in (0, 1)", hint)
    _above("algorithm.clip_high", c.clip_high, 0, "the papers have 0.28 (PPO 0.2, DIS 5.0)")
    _at_least("algorithm.nll_coef", c.nll_coef, 0, "0 turns the positive-example loss off")
    if c.behaviour_weight_cap is not None:
        hint = "a cap below 1 scales even on-policy tokens down; null = none"
        _at_least("algorithm.behaviour_weight_cap", c.behaviour_weight_cap, 1, hint)
    _above("algorithm.m2po_threshold", c.m2po_threshold, 0, "the paper has 0.04")
    hint = "an engine that agrees with the learner has the ratio 1"
    _require(0 <= c.mismatch_low < 1, "algorithm.mismatch_low", c.mismatch_low, "in [0, 1)", hint)
    _above("algorithm.mismatch_high", c.mismatch_high, 1, hint)
    if c.dual_clip is not None:
        _above("algorithm.dual_clip", c.dual_clip, 1, "null turns it off")
        plain = c.importance in (ImportanceKind.naive, ImportanceKind.decoupled, ImportanceKind.a3po)
        expected = f"null with algorithm.importance={c.importance.value}"
        _require(plain, "algorithm.dual_clip", c.dual_clip, expected, "that objective has no clip to bound")
    hint = "the share of task.max_response_tokens that the punishment's ramp covers; 0 turns it off"
    _require(0 <= c.overlong_cache < 1, "algorithm.overlong_cache", c.overlong_cache, "in [0, 1)", hint)
    _at_least("algorithm.kl_coef", c.kl_coef, 0, "0 turns the KL off")
    _at_least("algorithm.dynamic_sampling_patience", c.dynamic_sampling_patience, 1)
    if c.dynamic_sampling:
        hint = "one response is always all right or all wrong"
        expected = "≥ 2 with algorithm.dynamic_sampling=true"
        _require(c.group_size >= 2, "algorithm.group_size", c.group_size, expected, hint)
    _above("algorithm.vtrace_rho_cap", c.vtrace_rho_cap, 0, "the paper has 1")
    _above("algorithm.vtrace_c_cap", c.vtrace_c_cap, 0, "the paper has 1")
    if c.value_target is ValueTargetKind.vtrace:
        hint = "group advantages have no critic"
        gae = c.advantage is AdvantageKind.gae
        _require(gae, "algorithm.value_target", "vtrace", "lambda_return with algorithm.advantage=group", hint)
    _at_least("algorithm.critic_updates", c.critic_updates, 1)
    if c.value_clip is not None:
        _above("algorithm.value_clip", c.value_clip, 0, "null turns it off")
    _at_least("algorithm.entropy_coef", c.entropy_coef, 0, "0 turns the bonus off")
    _at_least("algorithm.policy_lr", c.policy_lr, 0)
    _at_least("algorithm.critic_lr", c.critic_lr, 0)
    _at_least("algorithm.lr_warmup_steps", c.lr_warmup_steps, 0)
    _at_least("algorithm.weight_decay", c.weight_decay, 0)
    _above("algorithm.max_grad_norm", c.max_grad_norm, 0, "a large number, 1e9, turns clipping off")


def _task(c: TaskConfig) -> None:
    hint = "the question has to get into the prompt"
    _require("{question}" in c.template, "task.template", c.template, "text that holds {question}", hint)
    _at_least("task.max_prompt_tokens", c.max_prompt_tokens, 1)
    _at_least("task.max_response_tokens", c.max_response_tokens, 1)
    _at_least("task.heldout_problems", c.heldout_problems, 1)
    _finite("task.reward_wrong", c.reward_wrong)
    _finite("task.reward_correct", c.reward_correct)
    bound, better = f"> task.reward_wrong = {c.reward_wrong}", c.reward_correct > c.reward_wrong
    _require(better, "task.reward_correct", c.reward_correct, bound, "else there is nothing to learn")
    match c:
        case ChainSumTaskConfig():
            _ordered("task.min_terms", c.min_terms, "task.max_terms", c.max_terms)
            _ordered("task.min_digits", c.min_digits, "task.max_digits", c.max_digits)
            _at_least("task.train_problems", c.train_problems, 1)
            _at_least("task.heldout_seed", c.heldout_seed, 0)
        case DatasetTaskConfig():
            _require(c.train != "", "task.train", c.train, "a file's path or the name of a data set")
            _require(c.question_column != "", "task.question_column", c.question_column, "a column's name")
            _require(c.answer_column != "", "task.answer_column", c.answer_column, "a column's name")
            hint = "null takes the whole answer column"
            _require(c.answer_separator != "", "task.answer_separator", c.answer_separator, "text or null", hint)


DTYPES = ("float32", "bfloat16", "float16")


def _model(c: ModelConfig) -> None:
    _require(c.dtype in DTYPES, "model.dtype", c.dtype, f"one of {', '.join(DTYPES)}")
    match c:
        case EmbeddedModelConfig():
            _at_least("model.num_layers", c.num_layers, 1)
            _at_least("model.num_heads", c.num_heads, 1)
            _at_least("model.intermediate_size", c.intermediate_size, 1)
            even = c.hidden_size >= 2 and c.hidden_size % (2 * c.num_heads) == 0
            hint = "every head needs an even width for its rotary positions"
            _require(even, "model.hidden_size", c.hidden_size, f"a multiple of 2·num_heads = {2 * c.num_heads}", hint)
            for name, value in vars(c).items():  # the recipe's many knobs, by their names' endings
                match name.rsplit("_", 1)[-1]:
                    case "rate":
                        _within(f"model.{name}", value, 0, 1)
                    case "lr" | "scale":
                        _above(f"model.{name}", value, 0)
                    case "tokens":
                        _at_least(f"model.{name}", value, 1)
                    case "steps" | "seed":
                        _at_least(f"model.{name}", value, 0)
        case WarmStartModelConfig():
            _at_least("model.warm_start_steps", c.warm_start_steps, 0, "0 takes the base as it is")
            _at_least("model.warm_start_batch_size", c.warm_start_batch_size, 1)
            _above("model.warm_start_lr", c.warm_start_lr, 0, "model.warm_start_steps=0 leaves the base as it is")
            _at_least("model.warm_start_seed", c.warm_start_seed, 0)
    if isinstance(c, FolderModelConfig):
        _require(c.path != "", "model.path", c.path, "a Hugging Face folder or hub name")


def _warm_start(config: Config) -> None:
    if isinstance(config.model, WarmStartModelConfig) and not isinstance(config.task, ChainSumTaskConfig):
        steps, hint = config.model.warm_start_steps, "only that task has worked solutions to train on"
        _require(steps == 0, "model.warm_start_steps", steps, "0 without task=chain_sum", hint)


def _engine(c: EngineConfig) -> None:
    _above("engine.temperature", c.temperature, 0, "greedy decoding explores nothing; scripts/evaluate.py can do it")
    hint = (
        "the learner cannot rebuild the cut distribution that stored log-probs are of; lower engine.temperature "
        "instead, or set evaluation.top_p for evaluations"
    )
    _require(c.top_p == 1, "engine.top_p", c.top_p, "1", hint)
    _at_least("engine.max_slots", c.max_slots, 1)
    _device("engine.device", c.device)
    if c.max_mismatch is not None:
        _above("engine.max_mismatch", c.max_mismatch, 0)
    if isinstance(c, VLLMEngineConfig):
        _vllm(c)


def _vllm(c: VLLMEngineConfig) -> None:
    known = c.dtype is None or c.dtype in DTYPES
    _require(known, "engine.dtype", c.dtype, f"one of {', '.join(DTYPES)} or null")
    _at_least("engine.tensor_parallel_size", c.tensor_parallel_size, 1)
    _within("engine.gpu_memory_utilization", c.gpu_memory_utilization, 0.01, 1)
    if c.kv_cache_mb is not None:
        _at_least("engine.kv_cache_mb", c.kv_cache_mb, 1)
    if c.device == "cpu":
        hint = "the CPU's engine is one process; launcher.threads_per_worker gives it more cores"
        _require(c.tensor_parallel_size == 1, "engine.tensor_parallel_size", c.tensor_parallel_size, "1", hint)
    else:
        hint = "Ray says which GPUs a process sees: leave the number out"
        _require(c.device == "cuda", "engine.device", c.device, "cpu or cuda with engine=vllm", hint)


def _engine_in_place(config: Config) -> None:
    """vLLM beside launcher and learner."""
    if not isinstance(config.engine, VLLMEngineConfig):
        return
    hint = "inline runs are deterministic, and vLLM's scheduler is not; use launcher=ray or engine=transformers"
    _require(isinstance(config.launcher, RayLauncherConfig), "launcher", "inline", "ray with engine=vllm", hint)
    if config.engine.weight_transport is WeightTransport.broadcast:
        kinds = {device.partition(":")[0] for device in (config.engine.device, config.learner.device)}
        hint = "one of NCCL (GPUs) and gloo (CPUs) connects them all; or use engine.weight_transport=shared_memory"
        expected = f"the engine's, {config.engine.device}, to broadcast"
        _require(len(kinds) == 1, "learner.device", config.learner.device, expected, hint)
    spread = config.engine.tensor_parallel_size
    if spread > 1 and isinstance(config.launcher, RayLauncherConfig):
        share, expected = config.launcher.gpus_per_actor, f"1 with engine.tensor_parallel_size={spread}"
        hint = "it is per GPU of an engine, and one that spreads over several shares none of them"
        _require(share == 1, "launcher.gpus_per_actor", share, expected, hint)


def _learner_in_place(config: Config) -> None:
    """DeepSpeed beside launcher and model."""
    c = config.learner
    if not isinstance(c, DeepSpeedLearnerConfig):
        return
    hint = "its ranks are processes of their own; use launcher=ray or learner=torch"
    _require(isinstance(config.launcher, RayLauncherConfig), "launcher", "inline", "ray with learner=deepspeed", hint)
    _at_least("learner.ranks", c.ranks, 1)
    _require(c.zero_stage in (1, 2, 3), "learner.zero_stage", c.zero_stage, "1, 2 or 3", "see configs/learner")
    if c.offload_parameters:
        hint = "the other stages keep all parameters on every rank"
        _require(c.zero_stage == 3, "learner.offload_parameters", True, "false below learner.zero_stage=3", hint)


def _learner(c: LearnerConfig, task: TaskConfig) -> None:
    longest = task.max_prompt_tokens + task.max_response_tokens
    bound = f"≥ task.max_prompt_tokens + task.max_response_tokens = {longest}"
    key, value = "learner.max_tokens_per_microbatch", c.max_tokens_per_microbatch
    _require(value >= longest, key, value, bound, "one response has to fit into a pass; shorten it or raise this")
    _at_least("learner.logprob_chunk_tokens", c.logprob_chunk_tokens, 1)
    _at_least("learner.threads", c.threads, 1)
    _at_least("learner.mismatch_versions", c.mismatch_versions, 0, "0 compares only tokens of the present weights")
    _device("learner.device", c.device)


def _device(key: str, device: str) -> None:
    known = re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None
    _require(known, key, device, "cpu, cuda or cuda:<n>")


def _launcher(c: LauncherConfig) -> None:
    if isinstance(c, InlineLauncherConfig):
        _at_least("launcher.overlap_steps", c.overlap_steps, 0, "0 generates nothing while a batch is learned")
        _require(c.replay != "", "launcher.replay", c.replay, "the path of a schedule.jsonl or null")
    if not isinstance(c, RayLauncherConfig):
        return
    if c.port is not None:
        _within("launcher.port", c.port, 1, 65_535, "null takes a free one")
        hint = "it is the port of a local Ray; with an address none is started: leave one of the two out"
        _require(c.address is None, "launcher.port", c.port, f"null with launcher.address={c.address}", hint)
    _require(c.address != "", "launcher.address", c.address, "host:port, ray://…, auto or null")
    _at_least("launcher.rollout_workers", c.rollout_workers, 1)
    _at_least("launcher.threads_per_worker", c.threads_per_worker, 1)
    _above("launcher.gpus_per_actor", c.gpus_per_actor, 0)
    for kind, amounts in (("learner", c.learner_resources), ("rollout", c.rollout_resources)):
        for name, amount in amounts.items():
            _above(f"launcher.{kind}_resources.{name}", amount, 0)
    _above("launcher.connect_timeout_s", c.connect_timeout_s, 0)
    _above("launcher.start_timeout_s", c.start_timeout_s, 0)
    _above("launcher.stage_timeout_s", c.stage_timeout_s, 0)
    _above("launcher.evaluation_timeout_s", c.evaluation_timeout_s, 0)
    _above("launcher.engine_timeout_s", c.engine_timeout_s, 0)
    _at_least("launcher.max_restarts", c.max_restarts, 0, "0 ends the run with the first death")


def _buffer(c: BufferConfig, algorithm: AlgorithmConfig) -> None:
    _at_least("buffer.max_staleness", c.max_staleness, 0, "0 is synchronous training")
    if c.lead is not None:
        bound = f"between 0 and buffer.max_staleness = {c.max_staleness}"
        hint = "0 ≤ lead ≤ max_staleness: batches generated further ahead would be too old; lower it or leave it null"
        _require(0 <= c.lead <= c.max_staleness, "buffer.lead", c.lead, bound, hint)
    groups = algorithm.groups_per_batch
    if c.capacity is not None:
        bound = f"≥ algorithm.groups_per_batch = {groups}"
        hint = "capacity ≥ groups_per_batch: with less no batch is ever full; raise it or leave it null"
        _require(c.capacity >= groups, "buffer.capacity", c.capacity, bound, hint)
    if c.max_running is not None:
        _at_least("buffer.max_running", c.max_running, 1, "with less nothing is ever generated; null sets no limit")
    _above("buffer.straggler_timeout_s", c.straggler_timeout_s, 0)
    _at_least("buffer.max_drops", c.max_drops, 0, "0 never drops: that is on_straggler=wait")


def _time_limits(config: Config) -> None:
    """A limit that is hit before the one inside it says the wrong thing, and ends what the inner one would mend."""
    if not isinstance(config.launcher, RayLauncherConfig):
        return
    stage = config.launcher.stage_timeout_s
    inner = {
        "verifier.timeout_s": config.verifier.timeout_s,
        "launcher.engine_timeout_s": config.launcher.engine_timeout_s,
    }
    if config.buffer.on_straggler is OnStraggler.drop:
        inner["buffer.straggler_timeout_s"] = config.buffer.straggler_timeout_s
    for key, limit in inner.items():
        hint = "the run would end before this limit is reached; lower it or raise the stage's"
        _require(limit < stage, key, limit, f"< launcher.stage_timeout_s = {stage:g}", hint)


def _verifier(c: VerifierConfig) -> None:
    _at_least("verifier.workers", c.workers, 1)
    _above("verifier.timeout_s", c.timeout_s, 0)
    _at_least("verifier.memory_mb", c.memory_mb, 512, "the math parser itself needs that much")


def _evaluation(c: EvaluationConfig, task: TaskConfig) -> None:
    _at_least("evaluation.every", c.every, 0, "0 evaluates only the base and the final policy")
    _at_least("evaluation.problems", c.problems, 1)
    _at_least("evaluation.samples", c.samples, 1)
    _above("evaluation.temperature", c.temperature, 0, "scripts/evaluate.py does greedy decoding")
    _require(0 < c.top_p <= 1, "evaluation.top_p", c.top_p, "in (0, 1]", "1 samples from all tokens")
    bound = f"≤ task.heldout_problems = {task.heldout_problems}"
    fits = c.problems <= task.heldout_problems
    _require(fits, "evaluation.problems", c.problems, bound, "raise task.heldout_problems or lower this")


def _require(holds: bool, key: str, value: object, expected: str, hint: str = "") -> None:
    if not holds:
        found = "null" if value is None else repr(value) if isinstance(value, str) else value
        raise ConfigError(f"{key} must be {expected}, found {found}" + (f": {hint}" if hint else ""))


def _at_least(key: str, value: float, low: float, hint: str = "") -> None:
    _require(low <= value < math.inf, key, value, f"≥ {low}", hint)


def _above(key: str, value: float, low: float, hint: str = "") -> None:
    _require(low < value < math.inf, key, value, f"> {low}", hint)


def _within(key: str, value: float, low: float, high: float, hint: str = "") -> None:
    _require(low <= value <= high, key, value, f"between {low} and {high}", hint)


def _finite(key: str, value: float) -> None:
    _require(math.isfinite(value), key, value, "a finite number")


def _ordered(low_key: str, low: int, high_key: str, high: int) -> None:
    _at_least(low_key, low, 1)
    _require(low <= high, low_key, low, f"≤ {high_key} = {high}")
