"""Joins a Ray cluster, or starts a local one that only this machine can reach."""

import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vapo_async.config import Config, ConfigError, DeepSpeedLearnerConfig, RayLauncherConfig, VLLMEngineConfig
from vapo_async.launcher.preflight import LOOPBACK, START_RAY, check_ray, ray_address, ray_address_source


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for one actor."""

    num_cpus: int = 0
    num_gpus: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)
    """By the names that nodes were started with."""

    @classmethod
    def of(
        cls, threads: int, device: str, config: RayLauncherConfig, custom: Mapping[str, float], spread: int = 1
    ) -> "Resources":
        """A CPU for each thread; where the device is not the CPU, ``launcher.gpus_per_actor`` ``spread`` times."""
        return cls(threads, 0.0 if device == "cpu" else spread * config.gpus_per_actor, custom)

    def options(self) -> dict[str, Any]:
        """As an actor is given them."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": dict(self.custom)}

    def bundle(self) -> dict[str, float]:
        """As a placement group reserves them."""
        standard = {"CPU": float(self.num_cpus), "GPU": self.num_gpus}
        return {kind: amount for kind, amount in (standard | dict(self.custom)).items() if amount}


@dataclass(frozen=True)
class Placement:
    """What each kind of actor is given; flow and verifier get nothing of their own."""

    learner: Resources
    learner_ranks: int
    evaluator: Resources
    rollout: Resources
    rollout_workers: int

    @property
    def all(self) -> list[Resources]:
        """One entry for each actor."""
        return [*[self.learner] * self.learner_ranks, self.evaluator, *[self.rollout] * self.rollout_workers]


def placement(config: Config, launcher: RayLauncherConfig) -> Placement:
    """An engine that spreads its model over several GPUs gets all of them in its actor, which is on one node."""
    engine = config.engine
    spread = engine.tensor_parallel_size if isinstance(engine, VLLMEngineConfig) else 1
    return Placement(
        Resources.of(config.learner.threads, config.learner.device, launcher, launcher.learner_resources),
        config.learner.ranks if isinstance(config.learner, DeepSpeedLearnerConfig) else 1,
        Resources.of(0, engine.device, launcher, launcher.rollout_resources, spread),
        Resources.of(launcher.threads_per_worker, engine.device, launcher, launcher.rollout_resources, spread),
        launcher.rollout_workers,
    )


def reserve_together(resources: Resources, count: int, limit_s: float) -> tuple[PlacementGroup, list[dict[str, Any]]]:
    """Room for ``count`` actors on as few nodes as can be, all or none: what each of them is started with.

    Raises:
        ConfigError: there was no room within ``limit_s`` seconds.
    """
    group = ray.util.placement_group([resources.bundle()] * count, strategy="PACK")
    if not group.wait(limit_s):
        ray.util.remove_placement_group(group)
        raise ConfigError(
            f"no room for the {count} ranks of the learner within {limit_s:.0f} s, {resources.bundle()} each: others "
            "use the Ray cluster too; lower learner.ranks, wait for them, or raise launcher.start_timeout_s"
        )
    return group, [{"scheduling_strategy": PlacementGroupSchedulingStrategy(group, i)} for i in range(count)]


def check_resources(needed: Sequence[Resources], nodes: Sequence[Mapping[str, float]]) -> None:
    """Looks whether the run fits into the cluster.

    Args:
        needed: by every actor, the learner's ranks first.
        nodes: what each node has in all, by Ray's names of resources.

    Raises:
        ConfigError: the cluster is too small, none of its nodes is large enough for one actor, or what the learner
            leaves of them is enough in all and nowhere enough for one.
    """
    settings = {
        "CPU": "launcher.rollout_workers, learner.ranks or the threads",
        "GPU": "launcher.rollout_workers, learner.ranks, launcher.gpus_per_actor or engine.tensor_parallel_size",
    }
    bundles = [resources.bundle() for resources in needed]
    for kind in ("CPU", "GPU", *sorted({kind for bundle in bundles for kind in bundle} - settings.keys())):
        lower = settings.get(kind, "launcher.learner_resources or launcher.rollout_resources")
        name = f"{kind}s" if kind in settings else f"of the resource '{kind}'"
        wanted = [bundle.get(kind, 0.0) for bundle in bundles]
        have = [node.get(kind, 0.0) for node in nodes]
        total, most = sum(wanted), max(wanted, default=0.0)
        if total > sum(have):
            raise ConfigError(
                f"the run needs {total:g} {name}, the Ray cluster has {sum(have):g}: lower {lower}, "
                "or give the cluster more"
            )
        if most > max(have, default=0.0):
            raise ConfigError(
                f"one process of the run needs {most:g} {name}, no node of the Ray cluster has more than "
                f"{max(have, default=0.0):g}: lower {lower}, or give the cluster a larger node"
            )
    if (crowded := _without_room(bundles, nodes)) is not None:
        bundle, count, places = crowded
        amounts = " and ".join(f"{n:g} {kind}{'s' * (kind in settings and n != 1)}" for kind, n in bundle.items())
        who = f"{count} processes of the run need" if count > 1 else "a process of the run needs"
        raise ConfigError(
            f"{who} {amounts} of one node{' each' * (count > 1)}, and beside the others the nodes of the Ray cluster "
            f"have room for {places or 'none'}: lower launcher.rollout_workers, learner.ranks or what one of them "
            "takes, or give the cluster more nodes"
        )


def _without_room(
    bundles: Sequence[dict[str, float]], nodes: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], int, int] | None:
    """A kind of process without room on the nodes: what one takes, how many there are, how many have room.

    Ranks that are reserved together fill one node after the other, each time the one of which they leave the most: what
    Ray's strategy PACK does. A single one is taken to be wherever it leaves room for the rest.
    """
    kinds = [(bundle, len(list(same))) for bundle, same in groupby(bundles)]
    if not kinds:
        return None
    (first, ranks), *others = kinds
    others.sort(key=lambda kind: -sum(kind[0].values()))  # the evaluator, which asks for no CPU, after the others
    if ranks > 1:
        return _crowded([(first, ranks), *others], nodes)
    alone = [i for i, node in enumerate(nodes) if _places(first, node)]
    tried = [_crowded(others, [*nodes[:i], _less(nodes[i], first, 1), *nodes[i + 1 :]]) for i in alone]
    if not tried:
        return (first, 1, 0) if first else None
    return None if None in tried else tried[0]


def _crowded(
    kinds: Sequence[tuple[dict[str, float], int]], nodes: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], int, int] | None:
    """The first kind that has no room beside those before it."""
    for bundle, count in kinds:
        places = sum(_places(bundle, node) for node in nodes)
        if places < count:
            return bundle, count, places
        nodes = _packed(bundle, count, nodes)
    return None


def _packed(bundle: Mapping[str, float], count: int, nodes: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """What is left of the nodes with ``count`` bundles on as few of them as can be."""

    def left_over(node: Mapping[str, float]) -> float:
        return sum(1 - amount / node[kind] for kind, amount in bundle.items() if node.get(kind))

    free = sorted(nodes, key=left_over, reverse=True)
    for i, node in enumerate(free):
        taken = min(count, _places(bundle, node))
        free[i], count = _less(node, bundle, taken), count - taken
    return free


def _less(node: Mapping[str, float], bundle: Mapping[str, float], count: int) -> Mapping[str, float]:
    return {**node, **{kind: node.get(kind, 0.0) - count * amount for kind, amount in bundle.items()}}


def _places(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many fit onto a node; Ray counts in ten-thousandths."""
    rooms = [round(node.get(kind, 0.0) * 1e4) // round(amount * 1e4) for kind, amount in bundle.items()]
    return min(rooms, default=sys.maxsize)


def cluster_nodes() -> list[dict[str, float]]:
    """What each living node of the cluster has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def start_ray(config: RayLauncherConfig, cpus: int) -> bool:
    """Connects; returns True if a local Ray was started (and is to be stopped with the run).

    Raises:
        ConfigError: nobody answers at the address, or the port is taken.
    """
    check_ray(config)
    # A death is told in one line by whoever notices it; Ray's own paragraph would tear the live line apart.
    ray_worker.print_to_stdstream = _silent
    address = ray_address(config)
    if address is not None:
        _join(address, ray_address_source(config))
        return False
    os.environ.pop("RAY_ADDRESS", None)
    if config.port is not None:
        os.environ["RAY_GCS_SERVER_PORT"] = str(config.port)
    else:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Otherwise Ray turns a loopback address into the machine's own and listens on every interface.
    of_clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = of_clusters  # this process may join or make a cluster later
    return True


def _silent(data: object, ignore_prefix: bool) -> None:
    """In the place of what prints the messages of Ray's own processes."""


def _join(address: str, where: str) -> None:
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}={address}: could not join this Ray cluster ({reason}); {START_RAY}") from error


def local_logs() -> Path:
    """Where the local Ray's processes write."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs"


def keep_logs(source: Path, target: Path) -> None:
    """Copies what the actors wrote: one file each for standard output and error, empty ones left out."""
    with suppress(OSError):  # a full disk, which may be why the run ends
        for path in source.glob("worker-*"):
            if path.stat().st_size:
                target.mkdir(exist_ok=True)
                shutil.copy(path, target)
