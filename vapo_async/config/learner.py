"""How a batch becomes an update, and on what."""

from dataclasses import dataclass


@dataclass
class LearnerConfig:
    """How a batch becomes an update."""

    max_tokens_per_microbatch: int = 16_384
    """Tokens of one forward-backward pass, padding included."""
    packing: bool = True
    """Takes rows through the models without padding between them, where their attention supports it and that saves
    tokens: any on a GPU, a tenth on a CPU; what ranks wait for each other counts."""
    logprob_chunk_tokens: int = 4096
    """No more logits than of this many positions are held at once; fewer where that is as fast."""
    threads: int = 1
    """Torch threads of the learner's process."""
    device: str = "cpu"
    """Where policy and critic live: ``cpu`` or ``cuda``."""
    activation_checkpointing: bool = False
    """Recomputes a layer's activations in the backward pass instead of holding them."""
    mismatch_versions: int = 1
    """Older policies kept on the side so that the engine's tokens can be compared under the weights that sampled them;
    each costs the memory of one policy, which ranks share with ``zero_stage=3``; 0 = only tokens of the present
    weights."""


@dataclass
class TorchLearnerConfig(LearnerConfig):
    """One process, plain torch."""


@dataclass
class DeepSpeedLearnerConfig(LearnerConfig):
    """DeepSpeed over many ranks, each a process on a device of its own: gloo between CPUs, NCCL between GPUs."""

    ranks: int = 1
    """Processes that share policy and critic."""
    zero_stage: int = 2
    """What the ranks share out: 1 optimizer states, 2 gradients too, 3 parameters too (arXiv 1910.02054)."""
    offload_optimizer: bool = False
    """Keeps optimizer states in the host's memory."""
    offload_parameters: bool = False
    """Likewise parameters; stage 3 only."""
