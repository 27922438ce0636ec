"""The typed configuration tree. ``configs/*.yaml`` fill it; :mod:`.checks` refuses contradictions.

Group choices (``task=``, ``model=``, ``engine=``, ``learner=``, ``launcher=``) are subclasses of the group's base
class: the code that needs one of them does a single ``match`` on its type.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vapo_async.config.algorithm import AlgorithmConfig
from vapo_async.config.engine import EngineConfig, TransformersEngineConfig, VLLMEngineConfig
from vapo_async.config.launcher import InlineLauncherConfig, LauncherConfig, RayLauncherConfig
from vapo_async.config.learner import DeepSpeedLearnerConfig, LearnerConfig, TorchLearnerConfig
from vapo_async.config.model import (
    EmbeddedModelConfig,
    FolderModelConfig,
    ModelConfig,
    SmolLM2ModelConfig,
)
from vapo_async.config.task import ChainSumTaskConfig, DatasetTaskConfig, TaskConfig


class OnStraggler(Enum):
    """What becomes of a group that a batch waits for (docs/staleness.md)."""

    wait = "wait"  # nothing is lost; a slow answer costs time
    drop = "drop"  # cancelled after a time limit: its ticket is refunded, its prompt comes first again


@dataclass
class BufferConfig:
    """The staleness-bounded flow (docs/staleness.md)."""

    max_staleness: int = 4
    """S: no group older than this many versions is ever trained on. 0 = synchronous."""
    lead: int | None = None
    """L ≤ S: how many batches generation may run ahead; null = min(1, S)."""
    capacity: int | None = None
    """Groups admitted and not yet published as trained, at most; null = (L + 1) · groups_per_batch."""
    max_running: int | None = None
    """Groups generated or judged at one time, over all rollout workers; null = what the engines' slots take."""
    on_straggler: OnStraggler = OnStraggler.wait
    """What becomes of the group that a batch waits for."""
    straggler_timeout_s: float = 60.0
    """Seconds that ``on_straggler=drop`` waits for one group before it is cancelled."""
    max_drops: int = 2
    """Times that ``drop`` may hit one prompt; from then on it is waited for, so that no prompt starves."""


@dataclass
class VerifierConfig:
    """The processes that judge answers."""

    workers: int = 1
    """Worker processes."""
    timeout_s: float = 2.0
    """Seconds, limit for one answer."""
    memory_mb: int = 2048
    """Address-space limit of a worker, MiB."""


@dataclass
class EvaluationConfig:
    """Held-out evaluation: avg@k."""

    every: int = 10
    """Policy updates between evaluations; the base and the final policy are always evaluated. 0 = only those two."""
    problems: int = 256
    """How many of ``task.heldout_problems`` are asked."""
    samples: int = 4
    """k of avg@k: responses to each problem."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Below 1, only the likeliest tokens that come to this probability are sampled from (nucleus sampling)."""


@dataclass
class LoggingConfig:
    """CSV is always written."""

    tensorboard: bool = False
    """Writes event files into the run folder."""
    wandb: bool = False
    """Logs to Weights & Biases."""
    trackio: bool = False
    """Logs to Trackio."""
    project: str = "vapo_async"
    """The project's name at Weights & Biases and Trackio."""


@dataclass
class CheckpointConfig:
    """What ``resume`` goes on from: models, optimizers, the flow with its unfinished responses, random states."""

    every: int = 20
    """Batches between checkpoints, value pretraining included, the first before batch 1; 0 = only at the end."""
    keep: int = 2
    """How many are kept, the newest ones."""


@dataclass
class Config:
    """The whole run."""

    name: str = "train"
    """Runs are written to ``runs_dir/name/<time>/``."""
    seed: int = 0
    """Of problems, sampling and mini-batches."""
    steps: int = 100
    """Policy updates (rollout batches after value pretraining)."""
    runs_dir: str = "runs"
    """The folder of all runs."""
    resume: str = "never"
    """``never``, ``auto`` (the newest run of this name that has a checkpoint) or the path of a run folder."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    engine: EngineConfig = MISSING
    learner: LearnerConfig = MISSING
    launcher: LauncherConfig = MISSING
    buffer: BufferConfig = field(default_factory=BufferConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


GROUPS: dict[str, dict[str, type[Any]]] = {
    "algorithm": {"base": AlgorithmConfig},
    "task": {"chain_sum": ChainSumTaskConfig, "dataset": DatasetTaskConfig},
    "model": {"embedded": EmbeddedModelConfig, "folder": FolderModelConfig, "smollm2": SmolLM2ModelConfig},
    "engine": {"transformers": TransformersEngineConfig, "vllm": VLLMEngineConfig},
    "learner": {"torch": TorchLearnerConfig, "deepspeed": DeepSpeedLearnerConfig},
    "launcher": {"inline": InlineLauncherConfig, "ray": RayLauncherConfig},
}
"""Group → schema name → dataclass; registered with Hydra as ``<group>/<name>_schema``."""


OVERLAYS = ("experiment", "ablation")
"""Groups without a schema, each laid over all that comes before it; ``null`` by default."""


def resolved_lead(buffer: BufferConfig) -> int:
    """L: the configured lead, or min(1, S)."""
    return min(1, buffer.max_staleness) if buffer.lead is None else buffer.lead


def resolved_max_mismatch(config: Config) -> float:
    """Nats: the configured limit, or 0.002 where engine and learner both compute in float32, else 0.1."""
    if config.engine.max_mismatch is not None:
        return config.engine.max_mismatch
    return 0.002 if config.model.dtype == resolved_engine_dtype(config) == "float32" else 0.1


def resolved_engine_dtype(config: Config) -> str:
    """Of the engine's weights: its own setting, or the model's."""
    own = config.engine.dtype if isinstance(config.engine, VLLMEngineConfig) else None
    return own or config.model.dtype
