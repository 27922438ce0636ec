"""Starts the actors, each with what Ray reserves for it."""

import time
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vapo_async.build import BaseModel
from vapo_async.config import Config, RayLauncherConfig
from vapo_async.launcher.ray_actors import GROUPS, EvaluatorActor, VerifierActor
from vapo_async.launcher.ray_cluster import Placement, Resources, reserve_together
from vapo_async.launcher.ray_flow import FlowActor
from vapo_async.launcher.ray_learner import LEARNER_GROUPS, LearnerActor
from vapo_async.launcher.ray_rollout import RolloutActor

_CALLS = 6  # of a rollout worker at one time: run, weights, a ping, questions


class Actors:
    """What is started is known here, to be ended together.

    Args:
        config: of the run.
        launcher: its limits.
        base: folders of the base model.
        placed: what each kind of actor is given.
    """

    def __init__(self, config: Config, launcher: RayLauncherConfig, base: BaseModel, placed: Placement) -> None:
        self._config, self._launcher, self._base, self._placed = config, launcher, base, placed
        self._started: list[Any] = []
        self._reserved: PlacementGroup | None = None
        self._watched: dict[str, Any] = {"concurrency_groups": GROUPS}
        self._again = self._watched | {"max_restarts": launcher.max_restarts, "max_task_retries": -1}

    def flow(self) -> Any:
        """Beside the driver: with its node the run ends anyway, with another one it need not."""
        return self._start(FlowActor, Resources(), self._config, self._base, **_beside_the_driver())

    def verifier(self) -> Any:
        options = self._again | _beside_the_driver()
        return self._start(VerifierActor, Resources(), self._config, max_concurrency=4, **options)

    def evaluator(self) -> Any:
        return self._start(EvaluatorActor, self._placed.evaluator, self._config, self._base, **self._again)

    def rollout(self, index: int, owner: str, flow: Any, verifier: Any) -> Any:
        """The process of rollout worker ``index`` under the name of an ``owner``."""
        launcher = self._launcher
        parts = (launcher.threads_per_worker, launcher.engine_timeout_s, flow, verifier)
        about = self._config, self._base, index, owner
        return self._start(RolloutActor, self._placed.rollout, *about, *parts, max_concurrency=_CALLS)

    def learner(self, deadline: float) -> list[Any]:
        """All ranks. Several are placed together, before anybody else takes the room."""
        resources, ranks = self._placed.learner, self._placed.learner_ranks
        where: list[dict[str, Any]] = [{}]
        if ranks > 1:
            limit = max(0.0, deadline - time.monotonic())
            self._reserved, where = reserve_together(resources, ranks, limit)
        groups: dict[str, Any] = {"concurrency_groups": LEARNER_GROUPS}
        parts = self._config, self._base
        return [self._start(LearnerActor, resources, *parts, rank, **groups, **where[rank]) for rank in range(ranks)]

    def kill(self) -> None:
        """In a cluster that goes on."""
        for actor in self._started:
            ray.kill(actor)
        if self._reserved is not None:
            ray.util.remove_placement_group(self._reserved)

    def _start(self, stage: type[Any], resources: Resources, *parts: Any, **options: Any) -> Any:
        """Ray counts ``resources`` against what the cluster has."""
        options |= resources.options()
        self._started.append(ray.remote(**options)(stage).remote(*parts))
        return self._started[-1]


def _beside_the_driver() -> dict[str, Any]:
    """What needs no resources would be placed anywhere."""
    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}
