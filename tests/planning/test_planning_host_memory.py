"""Memory of hosts by hand: the learner's and the engines' where they share a node."""

from dataclasses import replace

import pytest

from vapo_async.config.load import load_config
from vapo_async.planning.cluster import GIB, Cluster, read_cluster
from vapo_async.planning.fit import misfits
from vapo_async.planning.host_memory import host_parts
from vapo_async.planning.layout import Layout, NodeLoad
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.memory import Memory, Part
from vapo_async.planning.plan import make_plan

LENGTHS = ResponseLengths(4096, 0.8, 20_480, 200)
LEARNER = Memory((Part("states", 7, on_host=True), Part("on the device", 1000)), {"": ()})
STATES, COPIES = "learner: states", "learner: copies of the policy"
ENGINES, EVALUATOR = "weights for engines", "weights for the evaluator"


@pytest.mark.parametrize(
    ("load", "broadcast", "files", "by_hand"),
    [
        # Two of four ranks, and no engine: shares of half a model in copies and in Ray's store.
        (NodeLoad(2, 0), False, True, {STATES: 14, COPIES: 50, ENGINES: 50, EVALUATOR: 50}),
        # With a broadcast what was sent is kept, and beside it what is sent next and what is evaluated.
        (NodeLoad(2, 0), True, True, {STATES: 14, COPIES: 150, EVALUATOR: 50}),
        # Three engines, one of them the evaluator's: in the store for each kind, and two files twice, one twice.
        (NodeLoad(0, 3), False, True, {ENGINES: 100 + 2 * 200, EVALUATOR: 100 + 200}),
        (NodeLoad(0, 3), False, False, {ENGINES: 100, EVALUATOR: 100}),
        (NodeLoad(0, 3), True, True, {EVALUATOR: 300}),
        # All of it on one node.
        (NodeLoad(4, 3), False, True, {STATES: 28, COPIES: 100, ENGINES: 500, EVALUATOR: 300}),
        (NodeLoad(4, 1), False, True, {STATES: 28, COPIES: 100, ENGINES: 100, EVALUATOR: 300}),
    ],
)
def test_parts_of_a_node_by_hand(load: NodeLoad, broadcast: bool, files: bool, by_hand: dict[str, float]) -> None:
    parts = host_parts(load, Layout(4, 2, 1), LEARNER, 100, broadcast=broadcast, files=files)
    assert {part.name: part.bytes for part in parts} == by_hand


def one_node(memory_gib: float) -> Cluster:
    cluster = read_cluster("h100_64")
    return replace(cluster, nodes=1, node=replace(cluster.node, memory_gib=memory_gib))


def test_learner_and_engines_on_one_node_are_added_up() -> None:
    config = load_config(
        [
            "experiment=paper_qwen2.5_32b",
            "model.path=Qwen/Qwen2.5-7B",
            "learner.zero_stage=2",
            "learner.offload_optimizer=true",
            "learner.ranks=4",
            "launcher.rollout_workers=3",
            "engine.tensor_parallel_size=1",
            "engine.weight_transport=shared_memory",
            "task.max_response_tokens=8192",
            "learner.max_tokens_per_microbatch=10240",
        ]
    )
    plan = make_plan(config, one_node(300), LENGTHS)
    policy, critic = 7_615_616_512, 7_070_622_721
    # Master weights, moments, gradients of a step, parameters on their way back; two numbers of AdamW's for each of the
    # policy; the policy in bfloat16: copied, in Ray's store twice, and in the files of four engines twice.
    states = (4 + 8 + 4 + 2) * (policy + critic) + 2 * 4 * policy
    assert plan.host_bytes == pytest.approx(states + (1 + 2 + 4 * 2) * 2 * policy)
    (misfit,) = misfits(config, plan)
    assert misfit.component == "host memory"
    assert misfit.over_gib == pytest.approx(plan.host_bytes / GIB - 300)
    for more, holds in ((0.01, True), (-0.01, False)):
        larger = make_plan(config, one_node(300 + misfit.over_gib + more), LENGTHS)
        assert (misfits(config, larger) == []) == holds


def test_the_fullest_node_counts() -> None:
    """Of eight nodes five have eight of 40 ranks each, three have two engines each."""
    cluster, name = read_cluster("h100_64"), "experiment=paper_qwen2.5_32b"
    sent = make_plan(load_config([name]), cluster, LENGTHS)
    weights = 2 * sent.shape.parameters
    assert {part.name: part.bytes for part in sent.host_parts} == {EVALUATOR: pytest.approx(3 * weights)}
    through = make_plan(load_config([name, "engine.weight_transport=shared_memory"]), cluster, LENGTHS)
    assert through.host_bytes == pytest.approx(3 * weights + 3 * weights)
    assert through.publication.transfer_s > sent.publication.transfer_s
    away = make_plan(load_config([name, "learner.offload_optimizer=true"]), cluster, LENGTHS)
    numbers = (away.shape.parameters + away.shape.critic_parameters) / 40
    of_a_rank = 20 * numbers + 2 * 4 * away.shape.parameters / 40
    # Eight ranks with a fifth of the policy: kept, sent next, for the evaluator; and that once more in Ray's store.
    assert away.host_bytes == pytest.approx(8 * of_a_rank + 4 * weights / 5)
