"""Each stage from the config: what a process builds for itself, given the folder of the base model.

Every random source gets a seed of its own, derived from ``config.seed`` and the name of what draws from it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vapo_async.buffer import DynamicSampling, RolloutBuffer, StragglerWatch
from vapo_async.collector.collector import Collector
from vapo_async.collector.engine import Engine
from vapo_async.collector.engine_transformers import TransformersEngine
from vapo_async.collector.evaluator import Evaluator
from vapo_async.collector.vllm_environment import prepare_vllm
from vapo_async.config import (
    Config,
    ConfigError,
    DeepSpeedLearnerConfig,
    EngineConfig,
    EvaluationConfig,
    OnStraggler,
    RayLauncherConfig,
    TorchLearnerConfig,
    TransformersEngineConfig,
    VLLMEngineConfig,
    WarmStartModelConfig,
    WeightTransport,
    resolved_engine_dtype,
    resolved_lead,
    resolved_max_mismatch,
)
from vapo_async.config.algorithm import AdvantageKind
from vapo_async.flow import Flow
from vapo_async.learner.backend import ALL_PARTS, Schedule
from vapo_async.learner.learner import Learner
from vapo_async.learner.models import Critic
from vapo_async.models.load import check_device, ensure_model, ensure_tokenizer, load_policy, load_tokenizer
from vapo_async.models.warm_start import ensure_warm_start
from vapo_async.prompts.stream import PromptStream
from vapo_async.prompts.tasks import Task, build_task
from vapo_async.prompts.template import render
from vapo_async.prompts.worked import worked_examples
from vapo_async.schema import Problem
from vapo_async.verifier.scoring import TaskVerifier
from vapo_async.weights.shared_memory import shared
from vapo_async.weights.vllm_plugin import GLOO, NCCL, SHARED_MEMORY


@dataclass(frozen=True)
class BaseModel:
    """Folders of the base policy and of its tokenizer (often the same)."""

    model: Path
    tokenizer: Path


def ensure_base(config: Config, note: Callable[[str], None]) -> BaseModel:
    """The base policy's folders; made, fetched and warm-started where they are not there yet."""
    model = config.model
    folder = ensure_model(model, note)
    base = BaseModel(folder, ensure_tokenizer(model, folder))
    if not isinstance(model, WarmStartModelConfig) or model.warm_start_steps == 0:
        return base
    count = model.warm_start_steps * model.warm_start_batch_size
    examples = worked_examples(config.task, load_tokenizer(base.tokenizer), count, model.warm_start_seed)
    folder = ensure_warm_start(base.model, base.tokenizer, model, examples, note)
    return BaseModel(folder, ensure_tokenizer(model, folder))


def derived_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one random source of a run."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def engine_seed(config: Config, worker: int, published: int = 0) -> int:
    """Of a rollout worker's sampling; a run resumed at another version draws from another stream."""
    return derived_seed(config.seed, f"engine/{worker}/{published}")


def max_length(config: Config) -> int:
    """Tokens of the longest prompt and response together."""
    return config.task.max_prompt_tokens + config.task.max_response_tokens


def build_collector(config: Config, base: BaseModel, worker: int) -> Collector:
    """The rollout worker number ``worker``."""
    engine, tokenizer = _engine(config, base, config.engine, engine_seed(config, worker))
    return Collector(
        engine,
        tokenizer,
        group_size=config.algorithm.group_size,
        max_response_tokens=config.task.max_response_tokens,
    )


def build_evaluator(config: Config, base: BaseModel) -> Evaluator:
    """An engine of its own, at the evaluation's temperature and top-p."""
    seed = derived_seed(config.seed, "evaluation")
    engine, tokenizer = _engine(config, base, config.evaluation, seed)
    return Evaluator(engine, tokenizer, max_response_tokens=config.task.max_response_tokens, seed=seed)


def _engine(
    config: Config, base: BaseModel, sampling: EngineConfig | EvaluationConfig, seed: int
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """``sampling``: temperature and top-p are training's or the evaluation's."""
    settings = config.engine
    check_device("engine.device", settings.device)
    tokenizer = load_tokenizer(base.tokenizer)
    eos: Any = tokenizer.eos_token_id
    match settings:
        case TransformersEngineConfig():
            policy = load_policy(base.model, config.model.dtype)
            nn.Module.to(policy, settings.device)
            return TransformersEngine(
                policy,
                eos_token_id=eos,
                max_slots=settings.max_slots,
                max_length=max_length(config),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                kv_cache_on_update=settings.kv_cache_on_update,
                seed=seed,
            ), tokenizer
        case VLLMEngineConfig():
            prepare_vllm(settings.device, torch.get_num_threads())
            from vapo_async.collector.engine_vllm import VLLMEngine  # importing vLLM takes seconds

            return VLLMEngine(
                base.model,
                settings,
                eos_token_id=eos,
                max_length=max_length(config),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                dtype=resolved_engine_dtype(config),
                share=shared,
                backend=_weight_transfer(settings),
            ), tokenizer
    raise TypeError(f"no engine for {type(settings).__name__}")


def _weight_transfer(settings: VLLMEngineConfig) -> str:
    """By the name that vLLM knows it by."""
    if settings.weight_transport is WeightTransport.shared_memory:
        return SHARED_MEMORY
    return GLOO if settings.device == "cpu" else NCCL


def build_verifier(config: Config) -> TaskVerifier:
    cache_tokens = round(config.algorithm.overlong_cache * config.task.max_response_tokens)
    return TaskVerifier(config.task, config.verifier, cache_tokens)


def build_flow(config: Config, base: BaseModel) -> Flow:
    """The prompt stream, the bounded buffer and, where it is on, dynamic sampling."""
    tokenizer = load_tokenizer(base.tokenizer)
    task = build_task(config.task, config.seed)
    stream = PromptStream(task, tokenizer, config.task, derived_seed(config.seed, "prompts"))
    algorithm = config.algorithm
    buffer = RolloutBuffer(
        algorithm.groups_per_batch,
        algorithm.group_size,
        config.buffer.max_staleness,
        resolved_lead(config.buffer),
        capacity=config.buffer.capacity,
        max_running=config.buffer.max_running,
    )
    sampling = None
    if algorithm.dynamic_sampling:
        batch = algorithm.groups_per_batch
        sampling = DynamicSampling(
            algorithm.dynamic_sampling_patience * batch, exempt=algorithm.value_pretraining_steps * batch
        )
    watch = None
    if config.buffer.on_straggler is OnStraggler.drop:
        watch = StragglerWatch(config.buffer.straggler_timeout_s)
    return Flow(stream, buffer, sampling, watch, config.buffer.max_drops)


def build_learner(
    config: Config, base: BaseModel, rank: int = 0, meeting_point: tuple[str, int] | None = None
) -> Learner:
    """Policy and critic; the critic starts from ``model.critic_path``'s backbone or a copy of the policy's.

    Args:
        config: of the run.
        base: folders of the base model.
        rank: of this process, where several share the models.
        meeting_point: host and port at which these meet; returns once all are there.
    """
    check_device("learner.device", config.learner.device)

    def decode(token_ids: Sequence[int]) -> list[str]:
        tokenizer = load_tokenizer(base.tokenizer)
        return [str(tokenizer.decode([token_id])) for token_id in token_ids]

    build = partial(
        Learner,
        config.algorithm,
        config.learner,
        temperature=config.engine.temperature,
        seed=derived_seed(config.seed, "learner"),
        max_mismatch=resolved_max_mismatch(config),
        decode=decode,
    )
    match config.learner:
        case TorchLearnerConfig():
            return build(*_models(config, base))
        case DeepSpeedLearnerConfig() as settings:
            assert meeting_point is not None, "the launcher gives one"
            from vapo_async.learner.backend_deepspeed import DeepSpeedBackend  # imports DeepSpeed: seconds
            from vapo_async.learner.distributed import join_ranks
            from vapo_async.learner.load_in_parts import load_in_parts

            assert isinstance(config.launcher, RayLauncherConfig), "the configuration is checked for it"
            limit = config.launcher.stage_timeout_s
            ranks = join_ranks(*meeting_point, rank=rank, size=settings.ranks, device=settings.device, timeout_s=limit)

            def backend(module: nn.Module, schedule: Schedule, prefix: str) -> DeepSpeedBackend:
                return DeepSpeedBackend(module, schedule, settings, ranks, prefix)

            if settings.zero_stage < ALL_PARTS:
                policy, critic = _models(config, base)
            else:
                policy = load_in_parts(base.model, config.model.dtype, settings)
                critic = None
                if config.algorithm.advantage is AdvantageKind.gae:
                    folder = _critic_folder(config, base)
                    loaded = load_in_parts(folder, config.model.dtype, settings, decoder_only=True)
                    critic = Critic.from_decoder_of(loaded)
            return build(policy, critic, ranks=ranks, make_backend=backend)
    raise TypeError(f"no learner for {type(config.learner).__name__}")


def _models(config: Config, base: BaseModel) -> tuple[PreTrainedModel, Critic | None]:
    """Whole ones."""
    policy = load_policy(base.model, config.model.dtype)
    if config.algorithm.advantage is not AdvantageKind.gae:
        return policy, None
    if config.model.critic_path is None:
        return policy, Critic.from_policy(policy)
    return policy, Critic.from_decoder_of(load_policy(_critic_folder(config, base), config.model.dtype))


def _critic_folder(config: Config, base: BaseModel) -> Path:
    return base.model if config.model.critic_path is None else Path(config.model.critic_path)


@dataclass(frozen=True)
class HeldOut:
    """The held-out problems with their prompts."""

    problems: list[Problem]
    prompts: list[tuple[int, ...]]


def build_heldout(config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, problems: int) -> HeldOut:
    """The first ``problems`` held-out problems (all, if there are fewer) whose prompts fit."""
    rendered = [(problem, render(problem, tokenizer, config.task)[1]) for problem in task.heldout[:problems]]
    fitting = [(problem, ids) for problem, ids in rendered if len(ids) <= config.task.max_prompt_tokens]
    if not fitting:
        raise ConfigError(f"no held-out problem fits task.max_prompt_tokens={config.task.max_prompt_tokens}: raise it")
    return HeldOut([p for p, _ in fitting], [tuple(ids) for _, ids in fitting])
