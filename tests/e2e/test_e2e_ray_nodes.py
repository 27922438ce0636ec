"""A Ray cluster of several nodes, on one machine: engines on one, the learner on another; each is lost."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from running import command, newest_run, start, wait_for
from test_e2e_ray_faults import assert_balanced, summary_of, trained_tickets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

S = 2
ENGINES, LEARNERS = "engines", "learners"
NOTICED_S = 30
"""Ray takes a node for lost when it has missed its health checks for a while."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """The driver's node, which has room for nobody else; the tests add the others.

    Those have addresses of their own: a driver takes any node with its machine's address for the one that it is on.
    """
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def arguments(cluster: Cluster, *more: str) -> tuple[str, ...]:
    return (
        "launcher=ray",
        f"launcher.address={cluster.address}",
        f"launcher.rollout_resources={{{ENGINES}: 1}}",
        f"launcher.learner_resources={{{LEARNERS}: 1}}",
        f"buffer.max_staleness={S}",
        *more,
    )


@pytest.mark.slow
def test_the_run_goes_on_when_the_engines_node_is_lost_and_another_one_joins(
    cluster: Cluster, base_folder: Path, tmp_path: Path
) -> None:
    engines = cluster.add_node(num_cpus=2, resources={ENGINES: 3}, node_ip_address="127.0.0.2")
    cluster.add_node(num_cpus=2, resources={LEARNERS: 1}, node_ip_address="127.0.0.3")
    log = tmp_path / "log"
    # Generation is what takes time: there is something to lose.
    more = ("steps=60", "evaluation.every=30", "engine.max_slots=1", "buffer.lead=2")
    process = start(command(base_folder, tmp_path, *arguments(cluster, *more)), log)
    wait_for(log, "policy 5/", process)
    cluster.remove_node(engines, allow_graceful=False)
    wait_for(log, "rollout worker 0 is replaced (1 of 3 replacements)", process, timeout_s=NOTICED_S)
    cluster.add_node(num_cpus=2, resources={ENGINES: 3}, node_ip_address="127.0.0.2")
    assert process.wait(timeout=300) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
    summary = summary_of(newest_run(tmp_path))
    assert_balanced(summary)
    assert summary["status"] == "finished" and summary["versions"] == 61
    assert isinstance(summary["refund_reasons"], dict) and "worker lost" in summary["refund_reasons"]
    assert isinstance(summary["restarts"], dict) and summary["restarts"]["evaluator"] <= 2, "waiting is no death"
    trained = trained_tickets(newest_run(tmp_path))
    assert len(trained) == len(set(trained))


@pytest.mark.slow
def test_a_lost_learners_node_ends_the_run_which_resumes_on_another_one(
    cluster: Cluster, base_folder: Path, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=2, resources={ENGINES: 3}, node_ip_address="127.0.0.2")
    learner = cluster.add_node(num_cpus=2, resources={LEARNERS: 1}, node_ip_address="127.0.0.3")
    log, again = tmp_path / "log", tmp_path / "again"
    more = arguments(cluster, "evaluation.every=0", "checkpoint.every=3")
    process = start(command(base_folder, tmp_path, *more, "steps=100000"), log)
    wait_for(log, "policy 8/", process)
    cluster.remove_node(learner, allow_graceful=False)
    assert process.wait(timeout=120) == 1, log.read_text()
    assert re.search(r"^error: .*learner.*died.*$", log.read_text(), re.MULTILINE), log.read_text()
    assert "resume=auto goes on from" in log.read_text() and "Traceback" not in log.read_text()
    cluster.add_node(num_cpus=2, resources={LEARNERS: 1}, node_ip_address="127.0.0.3")
    process = start(command(base_folder, tmp_path, *more, "steps=20", "resume=auto"), again)
    assert process.wait(timeout=300) == 0, again.read_text()
    summary = summary_of(newest_run(tmp_path))
    assert_balanced(summary)
    assert summary["status"] == "finished"


def test_a_cluster_without_the_nodes_asked_for_is_told(cluster: Cluster, base_folder: Path, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=4, resources={ENGINES: 3}, node_ip_address="127.0.0.2")
    log = tmp_path / "log"
    process = start(command(base_folder, tmp_path, *arguments(cluster)), log)
    assert process.wait(timeout=120) == 2, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: the run needs 1 of the resource 'learners', the Ray cluster has 0: lower "), last
