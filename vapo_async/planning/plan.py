"""A run's configuration and a cluster become a plan: processes, memory, speed, what does not fit."""

from dataclasses import dataclass, replace

from vapo_async.config import (
    Config,
    ConfigError,
    DeepSpeedLearnerConfig,
    InlineLauncherConfig,
    KVCacheOnUpdate,
    RayLauncherConfig,
    VLLMEngineConfig,
    WeightTransport,
    resolved_engine_dtype,
)
from vapo_async.config.algorithm import AdvantageKind, ImportanceKind, MismatchKind, ValueTargetKind
from vapo_async.planning.cluster import GIB, Cluster
from vapo_async.planning.engine_memory import EngineMemory, EngineSizes, full_cache_memory, vllm_gpu_memory
from vapo_async.planning.host_memory import host_parts
from vapo_async.planning.layout import Layout, layout_of, node_loads, tensor_parallel_of
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.memory import Memory, Part, Pass, Sharing, learner_memory
from vapo_async.planning.shapes import ModelShape, shape_of
from vapo_async.planning.speed import Batch, Decoding, Learning, Publication, decoding, learning, publication

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """What ``scripts/plan.py`` tells. Times are in seconds, of the mean length; bytes where nothing else is said."""

    name: str
    cluster: Cluster
    shape: ModelShape
    layout: Layout
    sharing: Sharing
    lengths: ResponseLengths
    learner: Memory
    engine: EngineMemory
    host_parts: tuple[Part, ...]
    """In the host memory of the fullest node."""
    decoding: Decoding
    learning: Learning
    pretraining: Learning
    publication: Publication
    batch_tokens: float
    """Prompts and responses of a rollout batch."""
    generation_s: float
    """Of a rollout batch, all engines but the evaluator's with full slots."""
    recompute_s: float
    """That an engine takes after a weight update to compute the keys and values of what is in flight again."""
    evaluation_s: float

    @property
    def synchronous_s(self) -> float:
        """A step where one thing comes after the other."""
        return self.generation_s + self.learning.seconds + self.publication.transfer_s

    @property
    def overlapped_s(self) -> float:
        """A step where generation and learning hide each other: no lead is faster."""
        engines = self.generation_s + self.publication.stall_s + self.recompute_s
        return max(engines, self.learning.seconds + self.publication.transfer_s)

    @property
    def learner_over(self) -> float:
        """Bytes that a GPU of the learner lacks; negative: that are left."""
        return self.learner.peak() + self.cluster.device.overhead_gib * GIB - self.cluster.device_bytes

    @property
    def host_bytes(self) -> float:
        """In the host memory of the fullest node; without GPUs, of all processes."""
        held = sum(part.bytes for part in self.host_parts)
        if self.cluster.node.gpus:
            return held
        overhead = self.cluster.device.overhead_gib * GIB
        learners = self.layout.ranks * (self.learner.peak() + overhead)
        return held + learners + self.layout.engines * (self.engine.memory.peak() + overhead)

    @property
    def host_over(self) -> float:
        """Bytes that the hosts lack; negative: that are left."""
        return self.host_bytes - self.cluster.host_bytes


def make_plan(config: Config, cluster: Cluster, lengths: ResponseLengths, layout: Layout | None = None) -> Plan:
    """Args:
    config: of the run.
    cluster: where it is to run.
    lengths: of its responses, which no configuration knows.
    layout: instead of what the configuration asks for.

    Raises:
        ConfigError: what cannot be planned at all.
    """
    _check_devices(config, cluster)
    shape, asked = shape_of(config.model), layout_of(config)
    layout = asked if layout is None else layout
    sharing, batch = sharing_of(config, layout.ranks), _batch(config)
    e, engine_e = BYTES[config.model.dtype], BYTES[resolved_engine_dtype(config)]
    engine = engine_memory(config, cluster, shape)
    speed = decoding(
        shape, config.engine.max_slots, engine.kv_tokens, lengths, engine_e, layout.tensor_parallel, cluster
    )
    per_node = max(1, cluster.node.gpus // layout.tensor_parallel)
    published = publication(
        engine_e * shape.parameters,
        gathered=sharing.zero_stage == 3 and layout.ranks > 1,
        broadcast=_broadcasts(config),
        engine_nodes=-(-layout.workers // per_node),
        ranks=layout.ranks,
        members=layout.devices,
        cluster=cluster,
    )
    learned = learning(shape, batch, lengths, sharing, e, cluster)
    before = learning(shape, _pretraining(batch), lengths, sharing, e, cluster)
    rate = speed.tokens_per_s
    asked_tokens = config.evaluation.problems * config.evaluation.samples * lengths.mean
    recomputed = (
        speed.slots * lengths.mean_context if config.engine.kv_cache_on_update is KVCacheOnUpdate.recompute else 0.0
    )
    memory = learner_memory(shape, sharing, pass_of(config))
    return Plan(
        name=config.name,
        cluster=cluster,
        shape=shape,
        layout=layout,
        sharing=sharing,
        lengths=lengths,
        learner=memory,
        engine=engine,
        host_parts=_host_parts(config, cluster, layout, memory, engine_e * shape.parameters),
        decoding=speed,
        learning=learned,
        pretraining=before,
        publication=published,
        batch_tokens=batch.responses * lengths.mean_sequence,
        generation_s=batch.responses * lengths.mean / (layout.workers * rate),
        recompute_s=recomputed / speed.prefill_tokens_per_s,
        evaluation_s=asked_tokens / rate,
    )


def sharing_of(config: Config, ranks: int) -> Sharing:
    """How the learner's states are shared out over ``ranks``."""
    match config.learner:
        case DeepSpeedLearnerConfig(zero_stage=stage, offload_optimizer=states, offload_parameters=parameters):
            return Sharing(stage, ranks, states, parameters)
    return Sharing()


def pass_of(config: Config) -> Pass:
    """The learner's largest micro-batch, and what every rank keeps beside it."""
    learner, algorithm = config.learner, config.algorithm
    longest = config.task.max_prompt_tokens + config.task.max_response_tokens
    responses = algorithm.groups_per_batch * algorithm.group_size
    return Pass(
        tokens=learner.max_tokens_per_microbatch,
        chunk_tokens=learner.logprob_chunk_tokens,
        dtype_bytes=BYTES[config.model.dtype],
        checkpointing=learner.activation_checkpointing,
        critic=algorithm.advantage is AdvantageKind.gae,
        entropy_gradient=algorithm.entropy_coef != 0,
        older_policies=learner.mismatch_versions,
        reference=algorithm.kl_coef != 0,
        batch_positions=responses * longest,
        device=learner.device.partition(":")[0],
    )


def engine_memory(config: Config, cluster: Cluster, shape: ModelShape) -> EngineMemory:
    """Of one rank of an engine."""
    engine = config.engine
    mib = engine.kv_cache_mb if isinstance(engine, VLLMEngineConfig) else None
    sizes = EngineSizes(
        BYTES[resolved_engine_dtype(config)],
        engine.max_slots,
        config.task.max_prompt_tokens + config.task.max_response_tokens,
        tensor_parallel_of(config),
        None if mib is None else float(mib << 20),
    )
    if not isinstance(engine, VLLMEngineConfig) or engine.device == "cpu":
        return full_cache_memory(shape, sizes)
    share = engine.gpu_memory_utilization * cluster.device_bytes
    return vllm_gpu_memory(shape, sizes, share, cluster.device.overhead_gib * GIB)


def _batch(config: Config) -> Batch:
    a, critic = config.algorithm, config.algorithm.advantage is AdvantageKind.gae
    saved = a.importance is ImportanceKind.a3po and a.mismatch is MismatchKind.none  # a pass for π_prox
    saved = saved and a.value_target is ValueTargetKind.lambda_return
    return Batch(
        responses=a.groups_per_batch * a.group_size,
        minibatches=a.minibatches,
        epochs=a.epochs,
        critic_updates=a.critic_updates if critic else 0,
        passes=(0 if saved else 1) + int(critic) + int(a.kl_coef != 0),
        tokens_per_microbatch=config.learner.max_tokens_per_microbatch,
        checkpointing=config.learner.activation_checkpointing,
    )


def _pretraining(batch: Batch) -> Batch:
    """The critic's updates alone, after passes of both."""
    return replace(batch, policy_updates=0, passes=2)


def _broadcasts(config: Config) -> bool:
    engine = config.engine
    return isinstance(engine, VLLMEngineConfig) and engine.weight_transport is WeightTransport.broadcast


def _host_parts(config: Config, cluster: Cluster, layout: Layout, learner: Memory, weights: float) -> tuple[Part, ...]:
    """Of the fullest node."""
    if not isinstance(config.launcher, RayLauncherConfig):
        return ()
    how = {"broadcast": _broadcasts(config), "files": isinstance(config.engine, VLLMEngineConfig)}
    nodes = [host_parts(load, layout, learner, weights, **how) for load in node_loads(layout, cluster)]
    return max(nodes, key=lambda parts: sum(part.bytes for part in parts))


def _check_devices(config: Config, cluster: Cluster) -> None:
    kind = "cuda" if cluster.node.gpus else "cpu"
    for section in ("learner", "engine"):
        device = getattr(config, section).device
        if device.partition(":")[0] != kind:
            has = f"{cluster.node.gpus} GPUs in each node" if cluster.node.gpus else "no GPUs"
            raise ConfigError(f"{section}.device is {device}, but the cluster has {has}: set {section}.device={kind}")
    launcher = config.launcher
    if isinstance(launcher, RayLauncherConfig) and cluster.node.gpus and launcher.gpus_per_actor != 1:
        raise ConfigError(
            f"launcher.gpus_per_actor is {launcher.gpus_per_actor:g}, expected 1: a plan has one process for each GPU"
        )
    if isinstance(launcher, InlineLauncherConfig) and cluster.node.gpus:
        raise ConfigError("launcher is inline: a plan for GPUs has one process for each of them; set launcher=ray")
