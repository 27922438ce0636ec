"""Times worked out by hand, and how they move."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo_async.planning.cluster import Cluster, Device, Efficiency, Links, Node
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.memory import Sharing
from vapo_async.planning.shapes import ModelShape
from vapo_async.planning.speed import Batch, decoding, learning, publication

SHAPE = ModelShape("x", 10, 2, 2, 1, 5, 20, 100, tied=True)
CLUSTER = Cluster(
    "hand",
    4,
    Node(gpus=4, memory_gib=100, memory_gb_s=1e-6),
    Device(flops=1e6, memory_gb_s=1e-6, memory_gib=10),
    Links(gpu_gb_s=1e-6, network_gb_s=1e-7, host_gb_s=2e-6),
    Efficiency(learning_flops=0.5, prefill_flops=0.5, decode_memory=0.5, links=0.5, decode_step_ms=10),
)
"""A GPU of 1e6 FLOP/s that reads 1,000 bytes/s, links of 1,000, 100 and 2,000 bytes/s."""
EQUAL = ResponseLengths(90, 0.0, 1000, prompt_tokens=10)
BATCH = Batch(
    responses=8,
    minibatches=2,
    epochs=1,
    critic_updates=2,
    passes=2,
    tokens_per_microbatch=100,
    checkpointing=False,
)


def test_flops_of_a_batch_by_hand() -> None:
    """Each of 11 model passes: two evaluations, and three for each of the policy's and the critic's two updates."""
    n = SHAPE.parameters
    forward = 2 * n * 800 + 2 * SHAPE.layers * 10 * 8 * 100**2
    found = learning(SHAPE, BATCH, EQUAL, Sharing(), 4, CLUSTER)
    assert found.flops == forward * (2 + 3 * 3)
    assert found.compute_s == pytest.approx(found.flops / 5e5)
    assert found.communication_s == 0
    # 2 mini-batches × 3 updates, each reading and writing 7 numbers of 4 bytes for each parameter
    assert found.optimizer_s == pytest.approx(6 * 28 * n / 1000)
    assert found.seconds == pytest.approx(found.compute_s + found.optimizer_s)
    again = learning(SHAPE, replace(BATCH, checkpointing=True), EQUAL, Sharing(), 4, CLUSTER)
    assert again.flops == forward * (2 + 4 * 3)
    pretraining = learning(SHAPE, replace(BATCH, policy_updates=0), EQUAL, Sharing(), 4, CLUSTER)
    assert pretraining.flops == forward * (2 + 3 * 2)


def test_six_flops_for_each_parameter_and_token() -> None:
    """Of a large model with short sequences, where attention hardly counts; 8 with checkpointing."""
    wide = ModelShape("wide", 4096, 2, 32, 8, 128, 16_384, 1000, tied=True)
    batch = replace(BATCH, critic_updates=0, passes=0)
    for checkpointing, flops in ((False, 6), (True, 8)):
        found = learning(wide, replace(batch, checkpointing=checkpointing), EQUAL, Sharing(), 2, CLUSTER)
        assert found.flops == pytest.approx(flops * wide.parameters * 800, rel=0.005)


@pytest.mark.parametrize(
    ("stage", "rounds"),
    [
        (1, 6 * 2),  # gradients reduced, parameters gathered, at every step
        (2, 6 * (3 + 1)),  # gradients with every micro-batch
        (3, 3 * (3 * 6 + 2 * 2)),  # 3 micro-batches of 6 steps three times, and of two evaluations of two mini-batches
    ],
)
def test_communication_of_each_stage_by_hand(stage: int, rounds: int) -> None:
    batch = replace(BATCH, tokens_per_microbatch=75)  # 400 tokens over 2 ranks of 75 · 0.95: 2.8
    found = learning(SHAPE, batch, EQUAL, Sharing(stage, 2), 4, CLUSTER)
    assert found.microbatches == 3
    assert found.communication_s == pytest.approx(rounds * 4 * SHAPE.parameters / 500)


def test_an_offloaded_step_goes_over_the_link_and_shares_the_hosts_memory() -> None:
    here = learning(SHAPE, BATCH, EQUAL, Sharing(3, 8), 2, CLUSTER)
    away = learning(SHAPE, BATCH, EQUAL, Sharing(3, 8, offload_optimizer=True), 2, CLUSTER)
    numbers = SHAPE.parameters / 8
    assert here.optimizer_s == pytest.approx(6 * 28 * numbers / 1000)
    assert away.optimizer_s == pytest.approx(6 * (6 * numbers / 2000 + 28 * numbers * 4 / 1000))


def test_a_decode_step_reads_weights_and_keys() -> None:
    found = decoding(SHAPE, 3, 1e9, EQUAL, 2, 1, CLUSTER)
    weights, keys = 2 * SHAPE.parameters, 2 * 2 * 1 * 5 * 2  # of a token
    context = 10 + 45
    assert found.slots == 3
    assert found.step_s == pytest.approx((weights + 3 * context * keys) / 500 + 0.01)
    assert found.tokens_per_s == pytest.approx(3 / found.step_s)
    assert found.tokens_per_s_alone == pytest.approx(1 / ((weights + context * keys) / 500 + 0.01))
    assert found.prefill_tokens_per_s == pytest.approx(5e5 / (2 * SHAPE.parameters))


def test_arithmetic_holds_up_many_responses_and_the_cache_limits_them() -> None:
    fast = replace(CLUSTER, device=replace(CLUSTER.device, memory_gb_s=1e6))
    found = decoding(SHAPE, 100, 1e9, EQUAL, 2, 1, fast)
    assert found.step_s == pytest.approx(100 / found.prefill_tokens_per_s + 0.01)
    assert decoding(SHAPE, 100, 55 * 7 + 54, EQUAL, 2, 1, fast).slots == 7
    assert decoding(SHAPE, 100, 0, EQUAL, 2, 1, fast).slots == 1


def test_publications_by_hand() -> None:
    sizes = {"engine_nodes": 3, "cluster": CLUSTER}
    sent = publication(1000, gathered=False, broadcast=True, ranks=8, members=16, **sizes)  # type: ignore[arg-type]
    assert sent.transfer_s == sent.stall_s == pytest.approx(1000 / 50)  # by one link between nodes
    parts = publication(1000, gathered=True, broadcast=True, ranks=8, members=16, **sizes)  # type: ignore[arg-type]
    assert parts.transfer_s == pytest.approx(20 + 1000 / 200)  # and a ring of the learner's ranks over four of them
    inside = publication(1000, gathered=True, broadcast=True, ranks=4, members=16, **sizes)  # type: ignore[arg-type]
    assert inside.transfer_s == pytest.approx(20 + 1000 / 500)  # inside a node
    near = publication(1000, gathered=False, broadcast=True, ranks=8, members=4, **sizes)  # type: ignore[arg-type]
    assert near.transfer_s == pytest.approx(2)
    # Down, two turns that reach 1 and 2 nodes, up; engines wait for the last alone.
    host = publication(1000, gathered=False, broadcast=False, ranks=8, members=16, **sizes)  # type: ignore[arg-type]
    assert (host.transfer_s, host.stall_s) == (pytest.approx(1 + 2 * 20 + 1), pytest.approx(1))


@given(
    slots=st.integers(1, 1000),
    kv_tokens=st.floats(0, 1e6),
    median=st.floats(1, 500),
    sigma=st.floats(0, 2),
    tensor_parallel=st.sampled_from([1, 2]),
)
def test_full_engines_lie_between_one_response_and_all_at_its_speed(
    slots: int, kv_tokens: float, median: float, sigma: float, tensor_parallel: int
) -> None:
    """Which the simulation demands."""
    lengths = ResponseLengths(median, sigma, 1000, prompt_tokens=10)
    found = decoding(SHAPE, slots, kv_tokens, lengths, 2, tensor_parallel, CLUSTER)
    assert found.tokens_per_s_alone <= found.tokens_per_s <= found.slots * found.tokens_per_s_alone * (1 + 1e-9)
    assert 1 <= found.slots <= slots
