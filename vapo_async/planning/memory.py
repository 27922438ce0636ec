"""Memory of one process of the learner, by component. Pure functions of shapes and sizes; bytes throughout.

The peak is what stays (parameters, gradients, optimizer states, older policies, the batch) and the largest of what
comes and goes: the widest point of a forward and backward pass, the end of a backward pass, an optimizer step.
Gradients stay from the first micro-batch to the step, so the peak is that of the second micro-batch of a mini-batch on.

What a layer keeps for its backward pass was read off Transformers' Qwen2 and Llama modules with SDPA attention; all of
it is measured by ``benchmarks/plan_memory.py``. DeepSpeed's part is from its sources, version 0.19.8; what its tensors
add up to over all devices was measured for every stage with one rank.
"""

from dataclasses import dataclass
from typing import Final

from vapo_async.objectives.logprobs import OTHER_TILE_LOGITS, TILE_LOGITS
from vapo_async.planning.shapes import ModelShape

FLOAT: Final = 4
"""Bytes of master weights, moments, sums."""
BATCH_BYTES: Final = 50
"""Of one position of the learner's batch: tokens, masks, log-probs, versions, rewards, advantages and targets."""
REDUCE_BUCKET: Final = 500_000_000
"""DeepSpeed's ``reduce_bucket_size``: gradients that are reduced together; a buffer of that size for each engine."""
LIVE_PARAMETERS: Final = 1_000_000_000
"""DeepSpeed's ``stage3_max_live_parameters``: gathered at one time, at most; one parameter is always gathered whole."""
SUB_GROUP: Final = 1_000_000_000
"""DeepSpeed's ``sub_group_size``: parameters of a rank that are stepped together."""


@dataclass(frozen=True)
class Sharing:
    """Who keeps what. ``zero_stage`` 0 is plain torch in one process: no master weights, no buffers."""

    zero_stage: int = 0
    ranks: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def part(self, stage: int) -> float:
        """Share of what is cut from ``stage`` on that one rank keeps: 1 for all of it."""
        return 1 / self.ranks if self.zero_stage >= stage else 1.0


@dataclass(frozen=True)
class Pass:
    """The largest micro-batch, and what the run keeps beside it."""

    tokens: int
    """Padded tokens of a micro-batch."""
    chunk_tokens: int
    """``learner.logprob_chunk_tokens``."""
    dtype_bytes: int
    """Of parameters and activations."""
    checkpointing: bool = False
    critic: bool = True
    entropy_gradient: bool = False
    older_policies: int = 0
    reference: bool = False
    batch_positions: int = 0
    """Rows times the longest row of a rollout batch: every rank holds all of it."""
    device: str = "cuda"


@dataclass(frozen=True)
class Part:
    """One component of one process."""

    name: str
    bytes: float
    on_host: bool = False


@dataclass(frozen=True)
class Memory:
    """Of one process: what stays, and phases that take turns on the device."""

    stays: tuple[Part, ...]
    phases: dict[str, tuple[Part, ...]]

    @property
    def widest(self) -> str:
        """The phase that decides the peak."""
        return max(self.phases, key=lambda name: sum(part.bytes for part in self.phases[name]))

    @property
    def parts(self) -> tuple[Part, ...]:
        """At the peak."""
        return self.stays + self.phases[self.widest]

    def peak(self, *, on_host: bool = False) -> float:
        """Bytes on the device, or in the memory of its host."""
        return sum(part.bytes for part in self.parts if part.on_host == on_host)


def learner_memory(shape: ModelShape, sharing: Sharing, work: Pass) -> Memory:
    """Of one rank that trains policy and critic."""
    stays = [part for part in _states(shape, sharing, work) if part.bytes]
    e, embedding = work.dtype_bytes, shape.embedding_parameters
    widest = (
        Part("activations", activation_bytes(shape, work)),
        Part("log-probs and values", head_bytes(shape, work)),
        Part("gradient of the output embedding", e * embedding),
    )
    # Of tied embeddings the gradients of both uses are added at the very end.
    ends = (Part("gradients of the embeddings", e * embedding * (2 if shape.tied else 1)),)
    phases = {"pass": widest, "end of a pass": ends}
    step = _step(shape, sharing, work)
    if step.on_host:
        stays.append(step)
    else:
        phases["optimizer step"] = (step,)
    if sharing.zero_stage == 3:
        gathered = Part("gathered parameters", e * min(shape.parameters, max(LIVE_PARAMETERS, embedding)))
        phases["pass"], phases["end of a pass"] = (*widest, gathered), (*ends, gathered)
    return Memory(tuple(stays), phases)


def _states(shape: ModelShape, sharing: Sharing, work: Pass) -> list[Part]:
    models = {"policy": shape.parameters} | ({"critic": shape.critic_parameters} if work.critic else {})
    total, e = sum(models.values()), work.dtype_bytes
    away, cut = sharing.offload_optimizer, sharing.part(3)
    parts = [Part(f"{name}: parameters", e * n * cut, sharing.offload_parameters) for name, n in models.items()]
    if sharing.zero_stage == 0:  # cleared after each step, so that there are those of one model at a time
        parts.append(Part("gradients", e * max(models.values())))
    else:
        parts += _gradients(sharing, e, total)
        parts.append(Part("master weights (fp32)", FLOAT * total * sharing.part(1), away))
        buffers = len(models) if sharing.zero_stage == 3 else 1
        parts.append(Part("reduce buckets", buffers * e * REDUCE_BUCKET))
    parts.append(Part("AdamW's moments (fp32)", 2 * FLOAT * total * sharing.part(1), away))
    parts.append(Part(f"older policies ({work.older_policies})", work.older_policies * e * shape.parameters * cut))
    parts.append(Part("reference policy", e * shape.parameters * cut if work.reference else 0))
    parts.append(Part("batch", BATCH_BYTES * work.batch_positions))
    return parts


def _gradients(sharing: Sharing, dtype_bytes: int, numbers: int) -> list[Part]:
    """Sums in float32, from the first micro-batch to the step. With an offloaded optimizer the host steps a copy.

    Then stage 3 adds up on the host, too. The other stages add up on the device, and on the host where float32 is the
    dtype of the parameters, which come back through a buffer.
    """
    kept = FLOAT * numbers * sharing.part(2)
    if not sharing.offload_optimizer:
        return [Part("gradients (fp32)", kept)]
    own = numbers * sharing.part(1)
    if sharing.zero_stage == 3:
        return [Part("gradients (fp32, twice)", 2 * FLOAT * own, True)]
    on_host = dtype_bytes == FLOAT
    return [
        Part("gradients (fp32)", 0.0 if on_host and sharing.zero_stage == 2 else kept),
        Part("gradients of a step (fp32)", FLOAT * own * (2 if on_host else 1), True),
        Part("parameters on their way back", dtype_bytes * own, True),
    ]


def _step(shape: ModelShape, sharing: Sharing, work: Pass) -> Part:
    """What AdamW needs besides its states: two copies of what it steps at one time."""
    if sharing.zero_stage == 0 and work.device == "cpu":
        numbers = float(shape.embedding_parameters)  # one parameter after the other
    else:
        numbers = shape.parameters * sharing.part(1)  # all at once
        numbers = min(numbers, SUB_GROUP) if sharing.zero_stage == 3 else numbers
    return Part("AdamW's working memory", 2 * FLOAT * numbers, sharing.offload_optimizer)


def layer_bytes(shape: ModelShape, dtype_bytes: int) -> int:
    """Of one token in one layer, kept for the backward pass.

    Each norm keeps its input in float32, the normalised input and its output; attention queries, keys, values and
    output, and a float32 number for each head; the MLP gate, activated gate, up and their product.
    """
    norms = 2 * (shape.hidden * (FLOAT + 2 * dtype_bytes) + FLOAT)
    attention = dtype_bytes * 2 * (shape.query_width + shape.kv_width) + FLOAT * shape.heads
    return norms + attention + dtype_bytes * 4 * shape.intermediate


def activation_bytes(shape: ModelShape, work: Pass) -> float:
    """Of a micro-batch where it is widest.

    Without checkpointing: all layers, and either the last norm or the gradients of the last layer's MLP. With it: the
    inputs of all layers, and one layer computed again with the gradients of its MLP.
    """
    e, hidden = work.dtype_bytes, shape.hidden
    gradients = e * (2 * shape.intermediate + hidden)
    if work.checkpointing:
        return work.tokens * (shape.layers * e * hidden + layer_bytes(shape, e) + gradients)
    last = max(hidden * (FLOAT + e), gradients)
    return work.tokens * (shape.layers * layer_bytes(shape, e) + last)


def head_bytes(shape: ModelShape, work: Pass) -> float:
    """Hidden states before the output embedding, their gradient, and tiles of logits."""
    limit = TILE_LOGITS.get(work.device, OTHER_TILE_LOGITS)
    whole = work.tokens * shape.vocabulary
    tile = min(limit, work.chunk_tokens * shape.vocabulary, whole)
    tiles = (2 if work.entropy_gradient else 1) + (1 if tile == whole else 0)  # logits of one tile are kept
    return work.tokens * shape.hidden * (work.dtype_bytes + FLOAT) + max(2, tiles) * FLOAT * tile
