"""Which processes a run has, and on which nodes of a cluster they are placed."""

from collections.abc import Iterator
from dataclasses import dataclass

from vapo_async.config import Config, DeepSpeedLearnerConfig, RayLauncherConfig, VLLMEngineConfig
from vapo_async.planning.cluster import Cluster
from vapo_async.planning.shapes import ModelShape


@dataclass(frozen=True)
class Layout:
    """Which processes there are, and on how many GPUs. Without GPUs all of them are on the CPU."""

    ranks: int
    workers: int
    tensor_parallel: int
    evaluators: int = 1

    @property
    def engines(self) -> int:
        return self.workers + self.evaluators

    @property
    def devices(self) -> int:
        """GPUs that are asked for, one for each rank of learner and engines."""
        return self.ranks + self.engines * self.tensor_parallel


@dataclass(frozen=True)
class NodeLoad:
    """Processes on one node, at most."""

    ranks: int
    engines: int


def layout_of(config: Config) -> Layout:
    """What the configuration asks for."""
    ranks = config.learner.ranks if isinstance(config.learner, DeepSpeedLearnerConfig) else 1
    workers = config.launcher.rollout_workers if isinstance(config.launcher, RayLauncherConfig) else 1
    return Layout(ranks, workers, tensor_parallel_of(config))


def tensor_parallel_of(config: Config) -> int:
    return config.engine.tensor_parallel_size if isinstance(config.engine, VLLMEngineConfig) else 1


def engine_places(ranks: int, tensor_parallel: int, cluster: Cluster) -> int:
    """Engines that have room beside ``ranks``; an engine is on one node.

    The ranks are placed first, on as few nodes as can be: what Ray's placement group does with them.
    """
    return sum(nodes * (free // tensor_parallel) for nodes, free in _free(ranks, cluster) if nodes > 0)


def node_loads(layout: Layout, cluster: Cluster) -> list[NodeLoad]:
    """The kinds of nodes that there are, each with as many engines as have room; without GPUs, all nodes as one."""
    if not cluster.node.gpus:
        return [NodeLoad(layout.ranks, layout.engines)]
    return [
        NodeLoad(cluster.node.gpus - free, min(layout.engines, free // layout.tensor_parallel))
        for nodes, free in _free(layout.ranks, cluster)
        if nodes > 0
    ]


def _free(ranks: int, cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Nodes, and the GPUs on each that the ranks leave."""
    full, rest = divmod(ranks, cluster.node.gpus)
    yield min(full, cluster.nodes), 0
    if rest and full < cluster.nodes:
        yield 1, cluster.node.gpus - rest
    yield cluster.nodes - full - bool(rest), cluster.node.gpus


def uneven(shape: ModelShape, tensor_parallel: int) -> str | None:
    """What an engine of vLLM cannot cut into so many parts; None: it can."""
    if shape.heads % tensor_parallel:
        return f"{shape.heads} attention heads"
    if shape.kv_heads % tensor_parallel and tensor_parallel % shape.kv_heads:
        return f"{shape.kv_heads} heads of keys and values"  # fewer heads than ranks are repeated
    return f"MLP of {shape.intermediate:,}" if shape.intermediate % tensor_parallel else None


def even_sizes(shape: ModelShape, most: int) -> list[int]:
    """Values of ``engine.tensor_parallel_size`` that the model can be cut into, up to ``most``."""
    return [size for size in range(1, most + 1) if uneven(shape, size) is None]
