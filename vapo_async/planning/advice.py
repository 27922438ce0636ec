"""What makes a run fit: settings are tried one after the other on the plan itself, and the first that fit are named."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from vapo_async.config import (
    Config,
    DeepSpeedLearnerConfig,
    LearnerConfig,
    RayLauncherConfig,
    VLLMEngineConfig,
    WeightTransport,
)
from vapo_async.planning.cluster import GIB, Cluster
from vapo_async.planning.layout import Layout, engine_places, even_sizes, layout_of
from vapo_async.planning.plan import Plan, make_plan

Settings = dict[str, Any]
"""By key, as on the command line."""
Over = Callable[[Config, Plan], float]
"""Bytes that are too much; 0 or less: it fits."""


def learner_advice(config: Config, plan: Plan) -> str:
    """For a learner that does not fit its GPU."""
    host = max(0.0, plan.host_over)

    def over(_: Config, tried: Plan) -> float:
        return max(tried.learner_over, tried.host_over - host)

    return _first_that_fits(config, plan, _for_the_learner(config, plan), over)


def host_advice(config: Config, plan: Plan) -> str:
    """For hosts that are too small."""
    here = max(0.0, plan.learner_over) if plan.cluster.node.gpus else 0.0

    def over(_: Config, tried: Plan) -> float:
        return max(tried.host_over, tried.learner_over - here) if tried.cluster.node.gpus else tried.host_over

    return _first_that_fits(config, plan, _for_the_hosts(config, plan), over)


def engine_advice(config: Config, plan: Plan, over: Over) -> str:
    """For an engine that does not fit its GPUs."""
    return _first_that_fits(config, plan, _for_an_engine(config, plan), over)


@dataclass(frozen=True)
class _Tried:
    settings: str
    over: float


def _first_that_fits(config: Config, plan: Plan, candidates: Iterable[Settings], over: Over) -> str:
    best: _Tried | None = None
    for settings in candidates:
        changed = with_settings(config, settings)
        tried = _Tried(_text(settings), over(changed, make_plan(changed, plan.cluster, plan.lengths)))
        if tried.over <= 0:
            return f"{tried.settings} fits"
        if best is None or tried.over < best.over:
            best = tried
    if best is None:
        return "take a larger cluster"
    return f"nothing that was tried fits; {best.settings} comes nearest, {best.over / GIB:.1f} GiB too much"


def _for_the_learner(config: Config, plan: Plan) -> Iterator[Settings]:
    """What changes nothing about what is learned comes first, each alone and then together; what does comes last."""
    mild = list(_mild(config.learner, longest_of(config)))
    together: Settings = dict(item for settings in mild for item in settings.items())
    yield from mild
    for versions in range(config.learner.mismatch_versions - 1, -1, -1):
        yield {"learner.mismatch_versions": versions}
    sharded = isinstance(config.learner, DeepSpeedLearnerConfig)
    base: Settings = {} if sharded else _sharded(config.learner)
    more = [base | settings for settings in _more_ranks(config, plan)]
    yield from more
    if sharded:
        yield {"learner.offload_optimizer": True}
    if sharded and config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    together = base | together | {"learner.mismatch_versions": 0}
    yield together
    yield from (together | settings for settings in more)
    together |= {"learner.offload_optimizer": True}
    yield from (together | settings for settings in ({}, *more))
    if more:
        yield together | more[-1] | {"learner.zero_stage": 3, "learner.offload_parameters": True}
    yield from _shorter(config)


def _sharded(learner: LearnerConfig) -> Settings:
    """Instead of plain torch; with its micro-batches, for which the two have defaults of their own."""
    kept = {"learner.max_tokens_per_microbatch": learner.max_tokens_per_microbatch}
    return {"learner": "deepspeed", "learner.zero_stage": 3} | kept


def _mild(learner: LearnerConfig, longest: int) -> Iterator[Settings]:
    if not learner.activation_checkpointing:
        yield {"learner.activation_checkpointing": True}
    if isinstance(learner, DeepSpeedLearnerConfig) and learner.zero_stage < 3:
        yield {"learner.zero_stage": 3}
    if learner.max_tokens_per_microbatch > longest:
        yield {"learner.max_tokens_per_microbatch": longest}
    if learner.logprob_chunk_tokens > 512:
        yield {"learner.logprob_chunk_tokens": 512}


def _more_ranks(config: Config, plan: Plan) -> Iterator[Settings]:
    """Those that have room beside the engines; where they have none, with fewer engines."""
    layout = layout_of(config)
    if not plan.cluster.node.gpus or not isinstance(config.launcher, RayLauncherConfig):
        return
    for ranks in rank_choices(plan.cluster, layout.ranks + 1):
        workers = most_workers(replace(layout, ranks=ranks), plan.cluster)
        if workers >= layout.workers:
            yield {"learner.ranks": ranks}
        elif workers >= 1:
            yield {"learner.ranks": ranks, "launcher.rollout_workers": workers}


def _shorter(config: Config) -> Iterator[Settings]:
    """A smaller batch, which every rank holds all of; shorter responses."""
    algorithm, task = config.algorithm, config.task
    least = -(-algorithm.minibatches // algorithm.group_size)
    for groups in _halves(algorithm.groups_per_batch, least):
        yield {"algorithm.groups_per_batch": groups}
    for tokens in _halves(task.max_response_tokens, 1):
        shorter = {"task.max_response_tokens": tokens}
        yield shorter | {"learner.max_tokens_per_microbatch": task.max_prompt_tokens + tokens}


def _for_the_hosts(config: Config, plan: Plan) -> Iterator[Settings]:
    learner, engine, launcher = config.learner, config.engine, config.launcher
    if not plan.cluster.node.gpus:
        for slots in _halves(engine.max_slots, 1):
            yield {"engine.max_slots": slots}
        if learner.max_tokens_per_microbatch > longest_of(config):
            yield {"learner.max_tokens_per_microbatch": longest_of(config)}
        if isinstance(launcher, RayLauncherConfig):
            for workers in range(launcher.rollout_workers - 1, 0, -1):
                yield {"launcher.rollout_workers": workers}
        return
    sent = isinstance(engine, VLLMEngineConfig) and engine.weight_transport is not WeightTransport.broadcast
    broadcast: Settings = {"engine.weight_transport": "broadcast"} if sent else {}
    if broadcast:
        yield broadcast
    if isinstance(learner, DeepSpeedLearnerConfig):
        more = list(_more_ranks(config, plan))
        for key in ("offload_parameters", "offload_optimizer"):
            if getattr(learner, key):
                yield {f"learner.{key}": False}
                yield broadcast | {f"learner.{key}": False}
                yield from (settings | {f"learner.{key}": False} for settings in more)
        yield from more


def _for_an_engine(config: Config, plan: Plan) -> Iterator[Settings]:
    """Cut into more parts, where the model can be cut so and there is room; fewer slots."""
    layout = layout_of(config)
    if isinstance(config.engine, VLLMEngineConfig):
        for size in even_sizes(plan.shape, plan.cluster.node.gpus):
            wider = replace(layout, tensor_parallel=size)
            workers = min(layout.workers, most_workers(wider, plan.cluster))
            if size > layout.tensor_parallel and workers >= 1:
                fewer = {"launcher.rollout_workers": workers} if workers < layout.workers else {}
                yield {"engine.tensor_parallel_size": size} | fewer
    for slots in _halves(config.engine.max_slots, 1):
        yield {"engine.max_slots": slots}


def rank_choices(cluster: Cluster, least: int) -> list[int]:
    """Whole nodes; on one node any number."""
    step = cluster.node.gpus if cluster.nodes > 1 else 1
    return [ranks for ranks in range(step, cluster.gpus + 1, step) if ranks >= least]


def most_workers(layout: Layout, cluster: Cluster) -> int:
    """Rollout workers that have room beside the learner and the evaluator."""
    return engine_places(layout.ranks, layout.tensor_parallel, cluster) - layout.evaluators


def longest_of(config: Config) -> int:
    """Tokens of prompt and response, at most."""
    return config.task.max_prompt_tokens + config.task.max_response_tokens


def with_settings(config: Config, settings: Settings) -> Config:
    """A copy of the configuration; ``learner=deepspeed`` keeps what it has in common with the learner before."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if not name:
            config = replace(config, learner=DeepSpeedLearnerConfig(**asdict(config.learner)))
            continue
        value = WeightTransport(value) if name == "weight_transport" else value
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def _text(settings: Settings) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )


def _halves(number: int, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number
