"""Whether a plan fits its cluster: what is too large, by how much, what to change; and how to share out the GPUs."""

import math
from dataclasses import dataclass

from vapo_async.config import Config, DeepSpeedLearnerConfig, RayLauncherConfig, VLLMEngineConfig, resolved_engine_dtype
from vapo_async.planning.advice import (
    engine_advice,
    host_advice,
    learner_advice,
    longest_of,
    most_workers,
    rank_choices,
)
from vapo_async.planning.cluster import GIB, MIB
from vapo_async.planning.layout import Layout, engine_places, even_sizes, uneven
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.plan import BYTES, Plan, make_plan


@dataclass(frozen=True)
class Misfit:
    """What the cluster cannot hold. ``over_gib`` is 0 where it is no matter of memory."""

    component: str
    over_gib: float
    text: str
    """One line: what, by how much, what to change."""


def misfits(config: Config, plan: Plan) -> list[Misfit]:
    """All of them; an empty list where the run fits."""
    found = [Misfit("GPUs", 0.0, text) for text in _places(plan)]
    if plan.cluster.node.gpus:
        found += _learner(config, plan) + _engine(config, plan)
    return found + _host(config, plan)


def fits(config: Config, plan: Plan) -> bool:
    """Whether there are no misfits, without looking for what would help."""
    if plan.host_over > 0:
        return False
    return not plan.cluster.node.gpus or (
        not _places(plan) and plan.learner_over <= 0 and engine_over(config, plan) <= 0
    )


def _places(plan: Plan) -> list[str]:
    layout, cluster = plan.layout, plan.cluster
    if not cluster.node.gpus:
        return []
    size, found = layout.tensor_parallel, []
    if size > cluster.node.gpus:
        found.append(
            f"an engine takes {size} GPUs of one node, a node has {cluster.node.gpus}: "
            "lower engine.tensor_parallel_size"
        )
    if why := uneven(plan.shape, size):
        sizes = ", ".join(map(str, even_sizes(plan.shape, cluster.node.gpus)))
        found.append(f"engine.tensor_parallel_size is {size}, which cuts the model's {why} unevenly: take {sizes}")
    over = layout.devices - cluster.gpus
    if over > 0:
        found.append(
            f"{layout.devices} GPUs are asked for (learner {layout.ranks}, {layout.engines} engines of "
            f"{size}, one of them the evaluator's), the cluster has {cluster.gpus}: {over} too many; "
            "lower learner.ranks or launcher.rollout_workers"
        )
    elif size <= cluster.node.gpus and (places := engine_places(layout.ranks, size, cluster)) < layout.engines:
        workers = most_workers(layout, cluster)
        how = f"launcher.rollout_workers={workers} fits" if workers >= 1 else "lower learner.ranks"
        found.append(
            f"{layout.engines} engines, one of them the evaluator's, take {size} GPUs of one node each, and the nodes "
            f"have room for {places} beside {layout.ranks} ranks of the learner: {how}"
        )
    return found


def _learner(config: Config, plan: Plan) -> list[Misfit]:
    over = plan.learner_over
    if over <= 0:
        return []
    largest = max((part for part in plan.learner.parts if not part.on_host), key=lambda part: part.bytes)
    need = plan.learner.peak() / GIB + plan.cluster.device.overhead_gib
    text = (
        f"a learner's GPU needs {need:.1f} GiB and has {plan.cluster.device_bytes / GIB:.1f}: {over / GIB:.1f} GiB too "
        f"much, the most of it {largest.name} ({largest.bytes / GIB:.1f} GiB); {learner_advice(config, plan)}"
    )
    return [Misfit("learner", over / GIB, text)]


@dataclass(frozen=True)
class _Cache:
    """Of one GPU of an engine; bytes."""

    one: float
    """Of one response at full length."""
    wanted: float
    """Of the setting, or of all slots; of one response where the cache takes what is left."""
    room: float
    """Beside all else; below 0 where that alone is too large."""


def _cache(config: Config, plan: Plan) -> _Cache:
    engine, cluster = config.engine, plan.cluster
    token = plan.shape.kv_bytes_per_token(BYTES[resolved_engine_dtype(config)], plan.layout.tensor_parallel)
    one = longest_of(config) * token
    fixed = sum(part.bytes for part in plan.engine.memory.parts if part.name != "KV cache")
    has, wanted = cluster.device_bytes, plan.engine.memory.peak() - fixed
    if isinstance(engine, VLLMEngineConfig) and engine.kv_cache_mb is None:
        has, wanted = has * engine.gpu_memory_utilization, one
    return _Cache(one, wanted, has - fixed - cluster.device.overhead_gib * GIB)


def engine_over(config: Config, plan: Plan) -> float:
    """Bytes that a GPU of an engine lacks; 0 or less: it fits."""
    cache = _cache(config, plan)
    return max(max(cache.wanted, cache.one) - cache.room, cache.one - cache.wanted)


def _engine(config: Config, plan: Plan) -> list[Misfit]:
    engine, cache, longest = config.engine, _cache(config, plan), longest_of(config)
    over = engine_over(config, plan) / GIB
    if over <= 0:
        return []
    mib = engine.kv_cache_mb if isinstance(engine, VLLMEngineConfig) else None
    if cache.one > cache.room or mib is None:
        rest = plan.engine.memory.peak() - sum(p.bytes for p in plan.engine.memory.parts if p.name == "KV cache")
        least = isinstance(engine, VLLMEngineConfig)
        held = f"one response of {longest:,} tokens" if least else f"{engine.max_slots} responses at full length"
        text = (
            f"a GPU of an engine has no room for {held} beside {rest / GIB:.1f} GiB of weights and buffers: "
            f"{over:.1f} GiB too much; {engine_advice(config, plan, engine_over)}"
        )
    elif cache.wanted > cache.room:
        text = (
            f"engine.kv_cache_mb={mib} does not fit a GPU: {over:.1f} GiB too much; lower it to "
            f"{math.floor(cache.room / MIB)}"
        )
    else:
        text = (
            f"engine.kv_cache_mb={mib} does not hold one response of {longest:,} tokens: {over:.1f} GiB too little; "
            f"raise it to {math.ceil(cache.one / MIB)}"
        )
    return [Misfit("engine", over, text)]


def _host(config: Config, plan: Plan) -> list[Misfit]:
    """Of the fullest node; without GPUs, of all processes."""
    over = plan.host_over / GIB
    if over <= 0:
        return []
    where = "a node's host" if plan.cluster.node.gpus else "all nodes together"
    text = f"{where} would hold {plan.host_bytes / GIB:.1f} GiB and has {plan.cluster.host_bytes / GIB:.1f}"
    return [Misfit("host memory", over, f"{text}: {over:.1f} GiB too much; {host_advice(config, plan)}")]


def best_layout(config: Config, plan: Plan, lengths: ResponseLengths) -> Plan | None:
    """The plan that uses the cluster's GPUs best: of all ways to share them out that fit, the shortest overlapped step.

    None where no way fits, or where learner and engines are not free to be shared out.
    """
    free = isinstance(config.learner, DeepSpeedLearnerConfig) and isinstance(config.launcher, RayLauncherConfig)
    if not free or not plan.cluster.node.gpus:
        return None
    plans = []
    for ranks in rank_choices(plan.cluster, 1):
        workers = most_workers(Layout(ranks, 1, plan.layout.tensor_parallel), plan.cluster)
        if workers >= 1:
            layout = Layout(ranks, workers, plan.layout.tensor_parallel)
            plans.append(make_plan(config, plan.cluster, lengths, layout))
    return min((each for each in plans if fits(config, each)), key=lambda each: each.overlapped_s, default=None)
