"""Ranges and contradictions of ``learner``, and DeepSpeed beside the launcher."""

from vapo_async.config.launcher import RayLauncherConfig
from vapo_async.config.learner import DeepSpeedLearnerConfig, LearnerConfig
from vapo_async.config.requirements import at_least, known_device, require
from vapo_async.config.task import TaskConfig
from vapo_async.config.tree import Config


def check_learner(c: LearnerConfig, task: TaskConfig) -> None:
    """By itself, and with the lengths that it has to take."""
    longest = task.max_prompt_tokens + task.max_response_tokens
    bound = f"≥ task.max_prompt_tokens + task.max_response_tokens = {longest}"
    key, value = "learner.max_tokens_per_microbatch", c.max_tokens_per_microbatch
    require(value >= longest, key, value, bound, "one response has to fit into a pass; shorten it or raise this")
    at_least("learner.logprob_chunk_tokens", c.logprob_chunk_tokens, 1)
    at_least("learner.threads", c.threads, 1)
    at_least("learner.mismatch_versions", c.mismatch_versions, 0, "0 compares only tokens of the present weights")
    known_device("learner.device", c.device)


def check_learner_in_place(config: Config) -> None:
    """DeepSpeed beside the launcher."""
    c = config.learner
    if not isinstance(c, DeepSpeedLearnerConfig):
        return
    hint = "its ranks are processes of their own; use launcher=ray or learner=torch"
    require(isinstance(config.launcher, RayLauncherConfig), "launcher", "inline", "ray with learner=deepspeed", hint)
    at_least("learner.ranks", c.ranks, 1)
    require(c.zero_stage in (1, 2, 3), "learner.zero_stage", c.zero_stage, "1, 2 or 3", "see configs/learner")
    hint = "Ray says which GPU a rank sees: leave the number out"
    require(c.device in ("cpu", "cuda"), "learner.device", c.device, "cpu or cuda with learner=deepspeed", hint)
    if c.device == "cuda" and c.ranks > 1 and isinstance(config.launcher, RayLauncherConfig):
        share, expected = config.launcher.gpus_per_actor, f"≥ 1 with learner.device=cuda learner.ranks={c.ranks}"
        hint = "NCCL refuses two ranks on one GPU; raise it, or learner.ranks=1"
        require(share >= 1, "launcher.gpus_per_actor", share, expected, hint)
    if c.offload_parameters:
        hint = "the other stages keep all parameters on every rank"
        require(c.zero_stage == 3, "learner.offload_parameters", True, "false below learner.zero_stage=3", hint)
