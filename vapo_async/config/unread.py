"""Which settings of algorithm and buffer have no effect, given the others."""

from collections.abc import Iterable

from vapo_async.config.algorithm import AdvantageKind, ImportanceKind, MismatchKind, ValueTargetKind
from vapo_async.config.tree import Config, OnStraggler

CRITIC = (
    "gamma lmbda_critic length_adaptive alpha lmbda whiten_advantage value_target vtrace_rho_cap vtrace_c_cap "
    "critic_updates value_clip critic_lr"
)


def unread(config: Config) -> dict[str, str]:
    """Key → the setting that makes it one that nothing reads."""
    a = config.algorithm
    found: dict[str, str] = {}

    def unread_with(setting: str, names: str) -> None:
        found.update({f"algorithm.{name}": f"algorithm.{setting}" for name in names.split()})

    unread_with(f"length_adaptive={str(a.length_adaptive).lower()}", "lmbda" if a.length_adaptive else "alpha")
    if a.value_target is ValueTargetKind.lambda_return:
        unread_with("value_target=lambda_return", "vtrace_rho_cap vtrace_c_cap")
    if a.advantage is AdvantageKind.group:
        unread_with("advantage=group", CRITIC)
        found["model.critic_path"] = "algorithm.advantage=group"
    if a.importance is ImportanceKind.m2po:
        unread_with("importance=m2po", "clip_low clip_high")
    else:
        unread_with(f"importance={a.importance.value}", "m2po_threshold")
    if a.importance not in (ImportanceKind.decoupled, ImportanceKind.a3po):
        unread_with(f"importance={a.importance.value}", "behaviour_weight_cap")
    if a.mismatch in (MismatchKind.none, MismatchKind.tis):
        unread_with(f"mismatch={a.mismatch.value}", "mismatch_low")
    if a.mismatch is MismatchKind.none:
        unread_with("mismatch=none", "mismatch_high")
    if not a.dynamic_sampling:
        unread_with("dynamic_sampling=false", "dynamic_sampling_patience")
    if config.buffer.on_straggler is OnStraggler.wait:
        found |= {f"buffer.{name}": "buffer.on_straggler=wait" for name in ("straggler_timeout_s", "max_drops")}
    return found


def unread_notes(config: Config, overrides: Iterable[str]) -> list[str]:
    """A line for each key of the command line that has no effect."""
    reasons = unread(config)
    keys = dict.fromkeys(override.partition("=")[0] for override in overrides)
    return [f"{key} has no effect with {reasons[key]}" for key in keys if key in reasons]
