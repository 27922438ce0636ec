"""The typed configuration: the tree of dataclasses here, what reads, checks and explains it in the modules beside."""

from vapo_async.config.engine import (
    EngineConfig,
    KVCacheOnUpdate,
    TransformersEngineConfig,
    VLLMEngineConfig,
    WeightTransport,
)
from vapo_async.config.errors import ConfigError, RunError
from vapo_async.config.launcher import InlineLauncherConfig, LauncherConfig, RayLauncherConfig
from vapo_async.config.learner import DeepSpeedLearnerConfig, LearnerConfig, TorchLearnerConfig
from vapo_async.config.model import (
    EmbeddedModelConfig,
    FolderModelConfig,
    ModelConfig,
    SmolLM2ModelConfig,
    WarmStartModelConfig,
)
from vapo_async.config.task import AnswerStyle, ChainSumTaskConfig, DatasetTaskConfig, TaskConfig
from vapo_async.config.tree import (
    GROUPS,
    OVERLAYS,
    BufferConfig,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LoggingConfig,
    OnStraggler,
    VerifierConfig,
    resolved_engine_dtype,
    resolved_lead,
    resolved_max_mismatch,
)

__all__ = [
    "GROUPS",
    "OVERLAYS",
    "AnswerStyle",
    "BufferConfig",
    "ChainSumTaskConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DatasetTaskConfig",
    "DeepSpeedLearnerConfig",
    "EmbeddedModelConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FolderModelConfig",
    "InlineLauncherConfig",
    "KVCacheOnUpdate",
    "LauncherConfig",
    "LearnerConfig",
    "LoggingConfig",
    "ModelConfig",
    "OnStraggler",
    "RayLauncherConfig",
    "RunError",
    "SmolLM2ModelConfig",
    "TaskConfig",
    "TorchLearnerConfig",
    "TransformersEngineConfig",
    "VLLMEngineConfig",
    "VerifierConfig",
    "WarmStartModelConfig",
    "WeightTransport",
    "resolved_engine_dtype",
    "resolved_lead",
    "resolved_max_mismatch",
]
