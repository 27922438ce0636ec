"""Where the stages run, and how long each waits for another."""

from dataclasses import dataclass, field


@dataclass
class LauncherConfig:
    """Where the stages run."""


@dataclass
class InlineLauncherConfig(LauncherConfig):
    """Everything in one process, deterministic."""

    overlap_steps: int = 0
    """Decode steps while a batch is learned: each time between 0 and twice as many, drawn from the seed. 0 = none."""
    replay: str | None = None
    """``schedule.jsonl`` of an earlier inline run, whose interleaving is repeated; null = a schedule of its own."""


@dataclass
class RayLauncherConfig(LauncherConfig):
    """Every stage in a Ray actor of its own."""

    address: str | None = None
    """An existing cluster (``host:port``, ``ray://…`` or ``auto``); null = $RAY_ADDRESS, else a local one starts."""
    port: int | None = None
    """Port of the local Ray's control store; null = a free one."""
    rollout_workers: int = 1
    """Rollout processes, each with an engine of its own."""
    threads_per_worker: int = 1
    """Torch threads of a rollout worker."""
    gpus_per_actor: float = 1.0
    """GPUs that Ray reserves for each actor whose device is not the CPU; below 1 they share one."""
    learner_resources: dict[str, float] = field(default_factory=dict)
    """Of a rank of the learner, what else Ray reserves, by the names that ``ray start --resources`` gave to nodes."""
    rollout_resources: dict[str, float] = field(default_factory=dict)
    """Likewise of a rollout worker and of the evaluator: of whoever has an engine."""
    connect_timeout_s: float = 20.0
    """Seconds, limit for an existing cluster to answer."""
    start_timeout_s: float = 300.0
    """Seconds, limit for all actors together to come up."""
    evaluation_timeout_s: float = 3600.0
    """Limit for one held-out evaluation; one that takes longer costs its number, not the run."""
    stage_timeout_s: float = 600.0
    """Seconds, limit for one wait of one stage on another; ends in an error that names both."""
    engine_timeout_s: float = 120.0
    """Seconds, limit for one decode step or weight swap; a rollout worker that takes longer is replaced. A broadcast of
    weights that takes twice as long ends the run."""
    max_restarts: int = 3
    """Replacements over a run, of each rollout worker and of verifier and evaluator; one more death ends it."""
