"""Ranges and contradictions: what the types of the configuration cannot say.

Pure functions of the configuration. The first violation raises, as :mod:`.requirements` says it. Groups with many
settings have files of their own; what spans groups is here, but for an engine or a learner in its place.
"""

import re

from vapo_async.config.algorithm import AlgorithmConfig
from vapo_async.config.checks_algorithm import check_algorithm
from vapo_async.config.checks_engine import check_engine, check_engine_in_place
from vapo_async.config.checks_learner import check_learner, check_learner_in_place
from vapo_async.config.launcher import InlineLauncherConfig, LauncherConfig, RayLauncherConfig
from vapo_async.config.model import EmbeddedModelConfig, FolderModelConfig, ModelConfig, WarmStartModelConfig
from vapo_async.config.requirements import DTYPES, above, at_least, finite, ordered, require, within
from vapo_async.config.task import ChainSumTaskConfig, DatasetTaskConfig, TaskConfig
from vapo_async.config.tree import BufferConfig, Config, EvaluationConfig, OnStraggler, VerifierConfig


def check_config(config: Config) -> None:
    """Raises :class:`ConfigError` for the first value that is out of range or contradicts another."""
    _run(config)
    check_algorithm(config.algorithm)
    _task(config.task)
    _model(config.model)
    _warm_start(config)
    check_engine(config.engine)
    check_learner(config.learner, config.task)
    cache, longest = config.algorithm.overlong_cache, config.task.max_response_tokens
    hint = f"less is not a token of task.max_response_tokens = {longest}; 0 turns the punishment off"
    require(cache == 0 or cache * longest >= 1, "algorithm.overlong_cache", cache, f"0 or ≥ 1/{longest}", hint)
    _launcher(config.launcher)
    check_engine_in_place(config)
    check_learner_in_place(config)
    _buffer(config.buffer, config.algorithm)
    _time_limits(config)
    _verifier(config.verifier)
    _evaluation(config.evaluation, config.task)
    at_least("checkpoint.every", config.checkpoint.every, 0, "0 writes one only at the end and on Ctrl-C")
    at_least("checkpoint.keep", config.checkpoint.keep, 1)
    if config.logging.wandb or config.logging.trackio:
        require(config.logging.project.strip() != "", "logging.project", config.logging.project, "not empty")


def _run(c: Config) -> None:
    plain = re.fullmatch(r"[\w.-]+", c.name) is not None and c.name.strip(".") != ""
    require(plain, "name", c.name, "letters, digits, '-', '_' or '.'", "it names a folder in runs_dir")
    at_least("seed", c.seed, 0)
    at_least("steps", c.steps, 0)
    require(c.runs_dir != "", "runs_dir", c.runs_dir, "a folder's path")
    require(c.resume != "", "resume", c.resume, "never, auto or the path of a run folder")


def _task(c: TaskConfig) -> None:
    hint = "the question has to get into the prompt"
    require("{question}" in c.template, "task.template", c.template, "text that holds {question}", hint)
    at_least("task.max_prompt_tokens", c.max_prompt_tokens, 1)
    at_least("task.max_response_tokens", c.max_response_tokens, 1)
    at_least("task.heldout_problems", c.heldout_problems, 1)
    finite("task.reward_wrong", c.reward_wrong)
    finite("task.reward_correct", c.reward_correct)
    bound, better = f"> task.reward_wrong = {c.reward_wrong}", c.reward_correct > c.reward_wrong
    require(better, "task.reward_correct", c.reward_correct, bound, "else there is nothing to learn")
    match c:
        case ChainSumTaskConfig():
            ordered("task.min_terms", c.min_terms, "task.max_terms", c.max_terms)
            ordered("task.min_digits", c.min_digits, "task.max_digits", c.max_digits)
            at_least("task.train_problems", c.train_problems, 1)
            at_least("task.heldout_seed", c.heldout_seed, 0)
        case DatasetTaskConfig():
            require(c.train != "", "task.train", c.train, "a file's path or the name of a data set")
            require(c.question_column != "", "task.question_column", c.question_column, "a column's name")
            require(c.answer_column != "", "task.answer_column", c.answer_column, "a column's name")
            hint = "null takes the whole answer column"
            require(c.answer_separator != "", "task.answer_separator", c.answer_separator, "text or null", hint)


def _model(c: ModelConfig) -> None:
    require(c.dtype in DTYPES, "model.dtype", c.dtype, f"one of {', '.join(DTYPES)}")
    match c:
        case EmbeddedModelConfig():
            at_least("model.num_layers", c.num_layers, 1)
            at_least("model.num_heads", c.num_heads, 1)
            at_least("model.intermediate_size", c.intermediate_size, 1)
            even = c.hidden_size >= 2 and c.hidden_size % (2 * c.num_heads) == 0
            hint = "every head needs an even width for its rotary positions"
            require(even, "model.hidden_size", c.hidden_size, f"a multiple of 2·num_heads = {2 * c.num_heads}", hint)
            for name, value in vars(c).items():  # the recipe's many knobs, by their names' endings
                match name.rsplit("_", 1)[-1]:
                    case "rate":
                        within(f"model.{name}", value, 0, 1)
                    case "lr" | "scale":
                        above(f"model.{name}", value, 0)
                    case "tokens":
                        at_least(f"model.{name}", value, 1)
                    case "steps" | "seed":
                        at_least(f"model.{name}", value, 0)
        case WarmStartModelConfig():
            at_least("model.warm_start_steps", c.warm_start_steps, 0, "0 takes the base as it is")
            at_least("model.warm_start_batch_size", c.warm_start_batch_size, 1)
            above("model.warm_start_lr", c.warm_start_lr, 0, "model.warm_start_steps=0 leaves the base as it is")
            at_least("model.warm_start_seed", c.warm_start_seed, 0)
    if isinstance(c, FolderModelConfig):
        require(c.path != "", "model.path", c.path, "a Hugging Face folder or hub name")


def _warm_start(config: Config) -> None:
    if isinstance(config.model, WarmStartModelConfig) and not isinstance(config.task, ChainSumTaskConfig):
        steps, hint = config.model.warm_start_steps, "only that task has worked solutions to train on"
        require(steps == 0, "model.warm_start_steps", steps, "0 without task=chain_sum", hint)


def _launcher(c: LauncherConfig) -> None:
    if isinstance(c, InlineLauncherConfig):
        at_least("launcher.overlap_steps", c.overlap_steps, 0, "0 generates nothing while a batch is learned")
        require(c.replay != "", "launcher.replay", c.replay, "the path of a schedule.jsonl or null")
    if not isinstance(c, RayLauncherConfig):
        return
    if c.port is not None:
        within("launcher.port", c.port, 1, 65_535, "null takes a free one")
        hint = "it is the port of a local Ray; with an address none is started: leave one of the two out"
        require(c.address is None, "launcher.port", c.port, f"null with launcher.address={c.address}", hint)
    require(c.address != "", "launcher.address", c.address, "host:port, ray://…, auto or null")
    at_least("launcher.rollout_workers", c.rollout_workers, 1)
    at_least("launcher.threads_per_worker", c.threads_per_worker, 1)
    above("launcher.gpus_per_actor", c.gpus_per_actor, 0)
    for kind, amounts in (("learner", c.learner_resources), ("rollout", c.rollout_resources)):
        for name, amount in amounts.items():
            above(f"launcher.{kind}_resources.{name}", amount, 0)
    above("launcher.connect_timeout_s", c.connect_timeout_s, 0)
    above("launcher.start_timeout_s", c.start_timeout_s, 0)
    above("launcher.stage_timeout_s", c.stage_timeout_s, 0)
    above("launcher.evaluation_timeout_s", c.evaluation_timeout_s, 0)
    above("launcher.engine_timeout_s", c.engine_timeout_s, 0)
    at_least("launcher.max_restarts", c.max_restarts, 0, "0 ends the run with the first death")


def _buffer(c: BufferConfig, algorithm: AlgorithmConfig) -> None:
    at_least("buffer.max_staleness", c.max_staleness, 0, "0 is synchronous training")
    if c.lead is not None:
        bound = f"between 0 and buffer.max_staleness = {c.max_staleness}"
        hint = "0 ≤ lead ≤ max_staleness: batches generated further ahead would be too old; lower it or leave it null"
        require(0 <= c.lead <= c.max_staleness, "buffer.lead", c.lead, bound, hint)
    groups = algorithm.groups_per_batch
    if c.capacity is not None:
        bound = f"≥ algorithm.groups_per_batch = {groups}"
        hint = "capacity ≥ groups_per_batch: with less no batch is ever full; raise it or leave it null"
        require(c.capacity >= groups, "buffer.capacity", c.capacity, bound, hint)
    if c.max_running is not None:
        at_least("buffer.max_running", c.max_running, 1, "with less nothing is ever generated; null sets no limit")
    above("buffer.straggler_timeout_s", c.straggler_timeout_s, 0)
    at_least("buffer.max_drops", c.max_drops, 0, "0 never drops: that is on_straggler=wait")


def _time_limits(config: Config) -> None:
    """A limit that is hit before the one inside it says the wrong thing, and ends what the inner one would mend."""
    if not isinstance(config.launcher, RayLauncherConfig):
        return
    stage = config.launcher.stage_timeout_s
    inner = {
        "verifier.timeout_s": config.verifier.timeout_s,
        "launcher.engine_timeout_s": config.launcher.engine_timeout_s,
    }
    if config.buffer.on_straggler is OnStraggler.drop:
        inner["buffer.straggler_timeout_s"] = config.buffer.straggler_timeout_s
    for key, limit in inner.items():
        hint = "the run would end before this limit is reached; lower it or raise the stage's"
        require(limit < stage, key, limit, f"< launcher.stage_timeout_s = {stage:g}", hint)


def _verifier(c: VerifierConfig) -> None:
    at_least("verifier.workers", c.workers, 1)
    above("verifier.timeout_s", c.timeout_s, 0)
    at_least("verifier.memory_mb", c.memory_mb, 512, "the math parser itself needs that much")


def _evaluation(c: EvaluationConfig, task: TaskConfig) -> None:
    at_least("evaluation.every", c.every, 0, "0 evaluates only the base and the final policy")
    at_least("evaluation.problems", c.problems, 1)
    at_least("evaluation.samples", c.samples, 1)
    above("evaluation.temperature", c.temperature, 0, "scripts/evaluate.py does greedy decoding")
    require(0 < c.top_p <= 1, "evaluation.top_p", c.top_p, "in (0, 1]", "1 samples from all tokens")
    bound = f"≤ task.heldout_problems = {task.heldout_problems}"
    fits = c.problems <= task.heldout_problems
    require(fits, "evaluation.problems", c.problems, bound, "raise task.heldout_problems or lower this")
