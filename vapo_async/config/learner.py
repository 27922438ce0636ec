"""How a batch becomes an update, and on what."""

from dataclasses import dataclass


@dataclass
class LearnerConfig:
    """How a batch becomes an update."""

    max_tokens_per_microbatch: int = 16_384
    """Padded tokens of one forward-backward pass."""
    logprob_chunk_tokens: int = 4096
    """No more logits than of this many positions are held at once; fewer where that is as fast."""
    threads: int = 1
    """Torch threads of the learner's process."""
    device: str = "cpu"
    """Where policy and critic live: ``cpu`` or ``cuda``."""
    mismatch_versions: int = 1
    """Older policies kept on the side so that the engine's tokens can be compared under the weights that sampled them;
    each costs the memory of one policy; 0 = only tokens of the present weights."""


@dataclass
class TorchLearnerConfig(LearnerConfig):
    """One process, plain torch."""
