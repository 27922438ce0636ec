"""Time of generation, learning and publication from a stated model. Pure functions; seconds, bytes, FLOPs.

Learning: 2 FLOPs for each parameter and token of a forward pass, 4 of a backward pass, 2 more where activations are
computed again; attention adds 2·Q·l² to a forward pass of l tokens through a layer (half of all pairs are masked). All
at the cluster's share of the peak, which counts all of that, and ZeRO's communication on top: nothing overlaps.

Decoding: every step reads the weights and the keys and values of all responses in flight, or is held up by arithmetic,
whichever takes longer; plus a fixed time.
"""

import math
from dataclasses import dataclass
from typing import Final

from vapo_async.planning.cluster import Cluster
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.memory import FLOAT, Sharing
from vapo_async.planning.shapes import ModelShape

FILL: Final = 0.95
"""Share of the token budget of a micro-batch that is used."""


@dataclass(frozen=True)
class Batch:
    """What is learned from one rollout batch."""

    responses: int
    minibatches: int
    epochs: int
    critic_updates: int
    """K; 0 = no critic."""
    passes: int
    """Forward passes of models of the policy's size over the batch before its updates: π_prox, values, reference."""
    tokens_per_microbatch: int
    checkpointing: bool
    policy_updates: int = 1
    """0 in value pretraining."""


@dataclass(frozen=True)
class Learning:
    """Time of one batch."""

    flops: float
    """Of all ranks."""
    compute_s: float
    communication_s: float
    optimizer_s: float
    microbatches: int
    """Of one rank in one mini-batch."""

    @property
    def seconds(self) -> float:
        return self.compute_s + self.communication_s + self.optimizer_s


def learning(
    shape: ModelShape, batch: Batch, lengths: ResponseLengths, sharing: Sharing, dtype_bytes: int, cluster: Cluster
) -> Learning:
    """One rollout batch. The critic counts as large as the policy."""
    tokens = batch.responses * lengths.mean_sequence
    pairs = batch.responses * lengths.mean_square_sequence
    forward = 2 * shape.parameters * tokens + 2 * shape.layers * shape.query_width * pairs
    updates = batch.policy_updates + batch.critic_updates
    trained = (4 if batch.checkpointing else 3) * batch.epochs * updates
    flops = forward * (batch.passes + trained)
    rate = sharing.ranks * cluster.device.flops * cluster.efficiency.learning_flops
    budget = sharing.ranks * batch.tokens_per_microbatch * FILL
    microbatches = math.ceil(tokens / batch.minibatches / budget)
    steps = batch.minibatches * batch.epochs * updates
    rounds = _rounds(sharing, steps, microbatches, batch.passes * batch.minibatches)
    sent = rounds * dtype_bytes * shape.parameters
    return Learning(
        flops,
        flops / rate,
        sent / cluster.collective_bytes_s(sharing.ranks) if sharing.ranks > 1 else 0.0,
        steps * _step_s(shape, sharing, dtype_bytes, cluster),
        microbatches,
    )


def _rounds(sharing: Sharing, steps: int, microbatches: int, passes: int) -> int:
    """How often the bytes of a whole model go round the ring of all ranks."""
    match sharing.zero_stage:
        case 3:  # gathered for the forward and for the backward pass, whose gradients are scattered
            return microbatches * (3 * steps + passes)
        case 2:
            return steps * (microbatches + 1)
        case 1:
            return steps * 2
    return 0


def _step_s(shape: ModelShape, sharing: Sharing, dtype_bytes: int, cluster: Cluster) -> float:
    """Of one optimizer step: reads and writes master weights and moments; where they are on the host, over its link."""
    numbers = shape.parameters * sharing.part(1)
    if not sharing.offload_optimizer:
        return 7 * FLOAT * numbers / (cluster.device.memory_gb_s * 1e9)
    link = (FLOAT + dtype_bytes) * numbers / (cluster.links.host_gb_s * 1e9)
    together = min(sharing.ranks, max(1, cluster.node.gpus))
    return link + 7 * FLOAT * numbers * together / (cluster.node.memory_gb_s * 1e9)


@dataclass(frozen=True)
class Decoding:
    """One engine."""

    slots: int
    """Responses in flight: as asked for, or what the KV cache holds at their mean length."""
    step_s: float
    tokens_per_s: float
    """With all of them."""
    tokens_per_s_alone: float
    prefill_tokens_per_s: float


def decoding(
    shape: ModelShape,
    slots: int,
    kv_tokens: float,
    lengths: ResponseLengths,
    dtype_bytes: int,
    tensor_parallel: int,
    cluster: Cluster,
) -> Decoding:
    """An engine whose KV cache holds ``kv_tokens``, at least one of them at full length."""
    held = max(1, min(slots, int(kv_tokens / lengths.mean_context)))

    def step_s(responses: int) -> float:
        weights = dtype_bytes * shape.parameters / tensor_parallel
        cache = responses * lengths.mean_context * shape.kv_bytes_per_token(dtype_bytes, tensor_parallel)
        reading = (weights + cache) / (cluster.device.memory_gb_s * 1e9 * cluster.efficiency.decode_memory)
        arithmetic = responses / prefill
        return max(reading, arithmetic) + cluster.efficiency.decode_step_ms / 1e3

    prefill = tensor_parallel * cluster.device.flops * cluster.efficiency.prefill_flops / (2 * shape.parameters)
    return Decoding(held, step_s(held), held / step_s(held), 1 / step_s(1), prefill)


@dataclass(frozen=True)
class Publication:
    """From trained weights to engines that have them."""

    transfer_s: float
    """That the learner waits."""
    stall_s: float
    """That an engine stands still."""


def publication(
    model_bytes: float,
    *,
    gathered: bool,
    broadcast: bool,
    engine_nodes: int,
    ranks: int,
    members: int,
    cluster: Cluster,
) -> Publication:
    """Args:
    model_bytes: of the engine's weights.
    gathered: they are in parts over the learner's ranks, and put together first.
    broadcast: from the learner's first device to all engines at once; otherwise through the hosts: down from the
        device, to all nodes in turns that double, up again.
    engine_nodes: nodes with engines.
    ranks: devices of the learner.
    members: devices of learner and engines.
    cluster: its links.
    """
    links, share = cluster.links, cluster.efficiency.links
    gather = model_bytes / cluster.collective_bytes_s(ranks) if gathered else 0.0
    if broadcast:  # it leaves by the link of one device
        alone = members <= max(1, cluster.node.gpus)
        sent = model_bytes / ((links.gpu_gb_s if alone else links.network_gb_s) * 1e9 * share)
        return Publication(gather + sent, gather + sent)
    host = model_bytes / (links.host_gb_s * 1e9 * share)
    turns = math.ceil(math.log2(engine_nodes + 1)) if cluster.nodes > 1 else 0
    return Publication(gather + 2 * host + turns * model_bytes / (links.network_gb_s * 1e9 * share), host)
