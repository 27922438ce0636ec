"""Where processes have room: worked out by hand, and against placing them one after the other."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.planning.cluster import Cluster, read_cluster
from vapo_async.planning.layout import Layout, NodeLoad, engine_places, even_sizes, node_loads, uneven
from vapo_async.planning.shapes import KNOWN


def cluster_of(nodes: int, gpus: int) -> Cluster:
    cluster = read_cluster("h100_64")
    return replace(cluster, nodes=nodes, node=replace(cluster.node, gpus=gpus))


@pytest.mark.parametrize(
    ("nodes", "gpus", "ranks", "size", "places"),
    [
        (8, 8, 40, 4, 6),
        (8, 8, 40, 5, 3),  # 24 GPUs are left, of which 15 can be used
        (8, 8, 42, 8, 2),  # the sixth node has two ranks
        (8, 8, 44, 4, 5),  # half a node is left beside four ranks
        (1, 8, 4, 2, 2),
        (1, 8, 8, 1, 0),
        (2, 8, 17, 1, 0),
        (3, 8, 1, 16, 0),
    ],
)
def test_places_of_engines_by_hand(nodes: int, gpus: int, ranks: int, size: int, places: int) -> None:
    assert engine_places(ranks, size, cluster_of(nodes, gpus)) == places


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 60), st.integers(1, 10))
def test_places_are_those_of_placing_one_after_the_other(nodes: int, gpus: int, ranks: int, size: int) -> None:
    free = [gpus] * nodes
    for _ in range(ranks):
        room = next((i for i, left in enumerate(free) if left), None)
        if room is None:
            break
        free[room] -= 1
    placed = 0
    while (room := next((i for i, left in enumerate(free) if left >= size), None)) is not None:
        free[room] -= size
        placed += 1
    assert engine_places(ranks, size, cluster_of(nodes, gpus)) == placed


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 54), st.integers(1, 9), st.integers(1, 20))
def test_no_node_has_more_processes_than_gpus(nodes: int, gpus: int, ranks: int, size: int, workers: int) -> None:
    layout, cluster = Layout(ranks, workers, size), cluster_of(nodes, gpus)
    loads = node_loads(layout, cluster)
    assert all(load.ranks + size * load.engines <= gpus and load.engines <= layout.engines for load in loads)
    assert max(load.ranks for load in loads) == min(ranks, gpus)


def test_kinds_of_nodes_by_hand() -> None:
    assert node_loads(Layout(4, 3, 1), cluster_of(1, 8)) == [NodeLoad(4, 4)]
    assert node_loads(Layout(12, 5, 2), cluster_of(4, 8)) == [NodeLoad(8, 0), NodeLoad(4, 2), NodeLoad(0, 4)]
    assert node_loads(Layout(16, 2, 1), cluster_of(2, 8)) == [NodeLoad(8, 0)]
    assert node_loads(Layout(2, 3, 1), read_cluster("laptop")) == [NodeLoad(2, 4)]


def test_sizes_that_cut_a_model_evenly() -> None:
    """As vLLM asserts: heads and MLP are cut, heads of keys cut or repeated."""
    large = KNOWN["Qwen/Qwen2.5-32B"]  # 40 heads, 8 of keys, MLP of 27,648 = 2^10 · 27
    assert even_sizes(large, 40) == [1, 2, 4, 8]
    assert uneven(large, 3) == "40 attention heads"
    assert uneven(large, 5) == uneven(large, 10) == "8 heads of keys and values"
    wide = replace(large, heads=80, kv_heads=16)
    assert uneven(wide, 16) is None  # one head of keys for each rank
    assert uneven(replace(large, kv_heads=2), 4) is None  # two ranks have the same one
    assert uneven(replace(large, heads=40, kv_heads=5), 5) == "MLP of 27,648"
    assert large.kv_bytes_per_token(2, 16) == large.kv_bytes_per_token(2, 8) == 2 * 64 * 128 * 2
