"""Whether a plan fits its cluster: what is too large, by how much, what to change; and how to share out the GPUs."""

from dataclasses import dataclass

from vapo_async.config import (
    Config,
    DeepSpeedLearnerConfig,
    RayLauncherConfig,
    VLLMEngineConfig,
    resolved_engine_dtype,
)
from vapo_async.planning.cluster import GIB, Cluster
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.memory import Memory, learner_memory
from vapo_async.planning.plan import BYTES, Layout, Plan, make_plan, pass_of, sharing_of


@dataclass(frozen=True)
class Misfit:
    """What the cluster cannot hold. ``over_gib`` is 0 where it is no matter of memory."""

    component: str
    over_gib: float
    text: str
    """One line: what, by how much, what to change."""


def misfits(config: Config, plan: Plan) -> list[Misfit]:
    """All of them; an empty list where the run fits."""
    cluster = plan.cluster
    found = _places(plan) if cluster.node.gpus else []
    if cluster.node.gpus:
        found += _learner(config, plan) + _engine(config, plan)
    return found + _host(plan)


def _places(plan: Plan) -> list[Misfit]:
    layout, cluster = plan.layout, plan.cluster
    found = []
    if layout.tensor_parallel > cluster.node.gpus:
        found.append(
            f"an engine takes {layout.tensor_parallel} GPUs of one node, a node has {cluster.node.gpus}: "
            "lower engine.tensor_parallel_size"
        )
    if plan.shape.heads % layout.tensor_parallel:
        found.append(
            f"engine.tensor_parallel_size is {layout.tensor_parallel}, which does not divide the model's "
            f"{plan.shape.heads} attention heads"
        )
    over = layout.devices - cluster.gpus
    if over > 0:
        found.append(
            f"{layout.devices} GPUs are asked for (learner {layout.ranks}, {layout.engines} engines of "
            f"{layout.tensor_parallel}, one of them the evaluator's), the cluster has {cluster.gpus}: {over} too many; "
            "lower learner.ranks or launcher.rollout_workers"
        )
    return [Misfit("GPUs", 0.0, text) for text in found]


def _learner(config: Config, plan: Plan) -> list[Misfit]:
    over = plan.learner.peak() + plan.cluster.device.overhead_gib * GIB - plan.cluster.device_bytes
    if over <= 0:
        return []
    largest = max((part for part in plan.learner.parts if not part.on_host), key=lambda part: part.bytes)
    need = plan.learner.peak() / GIB + plan.cluster.device.overhead_gib
    text = (
        f"a learner's GPU needs {need:.1f} GiB and has {plan.cluster.device_bytes / GIB:.1f}: {over / GIB:.1f} GiB too "
        f"much, the most of it {largest.name} ({largest.bytes / GIB:.1f} GiB); {_less(config, plan, largest.name)}"
    )
    return [Misfit("learner", over / GIB, text)]


def _less(config: Config, plan: Plan, name: str) -> str:
    """What makes the learner's memory smaller, by its largest part."""
    learner, longest = config.learner, config.task.max_prompt_tokens + config.task.max_response_tokens
    if name == "activations":
        if not learner.activation_checkpointing:
            return "set learner.activation_checkpointing=true"
        if learner.max_tokens_per_microbatch > longest:
            return f"lower learner.max_tokens_per_microbatch, to {longest} at least"
        return "lower task.max_response_tokens"
    if name.startswith("older policies"):
        return "lower learner.mismatch_versions"
    if name == "reference policy":
        return "set algorithm.kl_coef=0"
    if name == "batch":
        return "lower algorithm.groups_per_batch or task.max_response_tokens: every rank holds the whole batch"
    if name == "log-probs and values":
        return "lower learner.logprob_chunk_tokens"
    if not isinstance(learner, DeepSpeedLearnerConfig):
        return "set learner=deepspeed learner.zero_stage=3, and learner.ranks"
    if learner.zero_stage < 3:
        return "set learner.zero_stage=3"
    for ranks in _rank_choices(plan.cluster, learner.ranks + 1):
        if _fits(config, plan, ranks):
            return f"learner.ranks={ranks} is the least that fits"
    return "set learner.offload_optimizer=true" if not learner.offload_optimizer else "take a larger cluster"


def _engine(config: Config, plan: Plan) -> list[Misfit]:
    longest = config.task.max_prompt_tokens + config.task.max_response_tokens
    engine, layout, device = config.engine, plan.layout, plan.cluster.device
    one = longest * plan.shape.kv_bytes_per_token(BYTES[resolved_engine_dtype(config)], layout.tensor_parallel)
    fixed = sum(part.bytes for part in plan.engine.memory.parts if part.name != "KV cache")
    has, cache = plan.cluster.device_bytes, plan.engine.memory.peak() - fixed
    if isinstance(engine, VLLMEngineConfig):
        what = f"has no room for one response of {longest:,} tokens beside {fixed / GIB:.1f} GiB of weights and buffers"
        how = f"raise engine.tensor_parallel_size ({layout.tensor_parallel}), or lower engine.max_slots"
        if engine.kv_cache_mb is None:  # it takes what is left of this
            has, cache = has * engine.gpu_memory_utilization, one
    else:
        what, how = f"cannot hold {engine.max_slots} responses at full length", "lower engine.max_slots"
    over = max(fixed + device.overhead_gib * GIB + cache - has, one - cache) / GIB
    return [Misfit("engine", over, f"a GPU of an engine {what}: {over:.1f} GiB too much; {how}")] if over > 0 else []


def _host(plan: Plan) -> list[Misfit]:
    """Of the fullest node; without GPUs, of all processes."""
    cluster, need = plan.cluster, host_bytes(plan)
    over = (need - cluster.host_bytes) / GIB
    if over <= 0:
        return []
    if cluster.node.gpus:
        where, how = "a node's host", "set learner.offload_optimizer=false, or engine.weight_transport=broadcast"
    else:
        settings = "engine.max_slots, learner.max_tokens_per_microbatch or launcher.rollout_workers"
        where, how = "all nodes together", f"lower {settings}"
    text = f"{where} would hold {need / GIB:.1f} GiB and has {cluster.host_bytes / GIB:.1f}"
    return [Misfit("host memory", over, f"{text}: {over:.1f} GiB too much; {how}")]


def host_bytes(plan: Plan) -> float:
    """In the host memory of the fullest node; without GPUs, of all nodes."""
    held = sum(part.bytes for part in plan.host_parts)
    if plan.cluster.node.gpus:
        return held
    layout, overhead = plan.layout, plan.cluster.device.overhead_gib * GIB
    learners = layout.ranks * (plan.learner.peak() + overhead)
    return held + learners + layout.engines * (plan.engine.memory.peak() + overhead)


def best_layout(config: Config, plan: Plan, lengths: ResponseLengths) -> Plan | None:
    """The plan that uses the cluster's GPUs best: of all ways to share them out that fit, the shortest overlapped step.

    None where no way fits, or where learner and engines are not free to be shared out.
    """
    launcher = config.launcher
    free = isinstance(config.learner, DeepSpeedLearnerConfig) and isinstance(launcher, RayLauncherConfig)
    if not free or not plan.cluster.node.gpus:
        return None
    tensor_parallel, plans = plan.layout.tensor_parallel, []
    for ranks in _rank_choices(plan.cluster, 1):
        workers = (plan.cluster.gpus - ranks) // tensor_parallel - plan.layout.evaluators
        if workers >= 1:
            plans.append(make_plan(config, plan.cluster, lengths, Layout(ranks, workers, tensor_parallel)))
    plans = [each for each in plans if not misfits(config, each)]
    return min(plans, key=lambda each: each.overlapped_s, default=None)


def _rank_choices(cluster: Cluster, least: int) -> list[int]:
    """Whole nodes; on one node any number."""
    step = cluster.node.gpus if cluster.nodes > 1 else 1
    return [ranks for ranks in range(step, cluster.gpus + 1, step) if ranks >= least]


def _fits(config: Config, plan: Plan, ranks: int) -> bool:
    memory: Memory = learner_memory(plan.shape, sharing_of(config, ranks), pass_of(config))
    return memory.peak() + plan.cluster.device.overhead_gib * GIB <= plan.cluster.device_bytes
