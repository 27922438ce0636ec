"""A plan as text, and as plain data."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vapo_async.config import Config, DeepSpeedLearnerConfig, RayLauncherConfig
from vapo_async.planning.cluster import GIB, MIB
from vapo_async.planning.fit import Misfit
from vapo_async.planning.memory import Part
from vapo_async.planning.plan import Plan

Row = tuple[str, str]
WIDTH = 120


def plan_text(config: Config, plan: Plan) -> str:
    """Processes, memory, times and what they rest on."""
    parts = [_rows([("plan", f"{plan.name} on {plan.cluster.name}"), *_processes(config, plan)])]
    parts += [_memory(plan), _rows(_speed(config, plan)), "it rests on\n" + _rows(_assumptions(plan))]
    return "\n\n".join(parts)


def _processes(config: Config, plan: Plan) -> list[Row]:
    shape, layout, critic = plan.shape, plan.layout, config.algorithm.advantage.name == "gae"
    models = f"policy of {shape.parameters / 1e9:.4g} billion parameters"
    models += f", critic of {shape.critic_parameters / 1e9:.4g}" if critic else ", no critic"
    rows = [("model", f"{shape.name}: {models}, {config.model.dtype}")]
    zero = f" (ZeRO-{plan.sharing.zero_stage})" if plan.sharing.zero_stage else ""
    if not plan.cluster.node.gpus:
        return [*rows, ("processes", f"learner {layout.ranks}{zero} · engines {layout.workers} · evaluator 1")]
    engines = f"engines {layout.workers} × {layout.tensor_parallel} · evaluator {layout.tensor_parallel}"
    idle = max(0, plan.cluster.gpus - layout.devices)
    return [*rows, ("GPUs", f"learner {layout.ranks}{zero} · {engines} · idle {idle} · in all {plan.cluster.gpus}")]


def _memory(plan: Plan) -> str:
    overhead, has = plan.cluster.device.overhead_gib * GIB, plan.cluster.device_bytes
    fixed = [Part("context, buffers, fragmentation", overhead)] if overhead else []
    where = "a GPU" if plan.cluster.node.gpus else "the process"
    learner = [*(part for part in plan.learner.parts if not part.on_host), *fixed]
    text = [_table(f"learner, {where}", learner, has)]
    text.append(_table(f"engine, {where}", [*plan.engine.memory.parts, *fixed], has))
    if plan.cluster.node.gpus and plan.host_parts:
        text.append(_table("host, the fullest node", plan.host_parts, plan.cluster.node.memory_gib * GIB))
    if not plan.cluster.node.gpus:
        text.append(f"all processes together: {plan.host_bytes / GIB:.2f} of {plan.cluster.host_bytes / GIB:,.1f} GiB")
    return "\n\n".join(text)


def _table(title: str, parts: Sequence[Part], has_bytes: float) -> str:
    total = sum(part.bytes for part in parts)
    unit, name = (GIB, "GiB") if total >= GIB else (MIB, "MiB")
    rows = [(part.name, f"{part.bytes / unit:10.2f}") for part in parts]
    return f"{title}, {name}\n" + _rows([*rows, ("in all", f"{total / unit:10.2f} of {has_bytes / unit:,.1f}")])


def _speed(config: Config, plan: Plan) -> list[Row]:
    engine, learned = plan.decoding, plan.learning
    tokens, workers = plan.batch_tokens, plan.layout.workers
    pretraining = config.algorithm.value_pretraining_steps > 0
    before = f" ({duration(plan.pretraining.seconds)} in value pretraining)" if pretraining else ""
    kv = f"{plan.engine.kv_tokens:,.0f} tokens, {plan.engine.full_length:.1f} responses at full length"
    held = f"{_count(engine.slots, 'response')} of mean length in flight"
    step = f"{engine.step_s * 1e3:.1f} ms a decode step"
    speed = f"{engine.tokens_per_s:,.0f} tokens/s an engine, {workers * engine.tokens_per_s:,.0f} in all"
    passes = _count(learned.microbatches, "micro-batch", "es")
    share = f"{learned.compute_s / learned.seconds:.0%} arithmetic, {passes} a mini-batch"
    again = f", then for {duration(plan.recompute_s)} while keys and values are computed again" * (plan.recompute_s > 0)
    return [
        ("KV cache", f"{kv}; {held}"),
        ("generation", f"{speed}; {step}, {engine.tokens_per_s_alone:.0f} tokens/s alone"),
        ("learning", f"{tokens / learned.seconds:,.0f} tokens/s; {learned.flops:.3g} FLOPs a batch; {share}"),
        ("a batch", f"{tokens:,.0f} tokens: generated in {duration(plan.generation_s)}, "
                    f"learned in {duration(learned.seconds)}{before}"),
        ("publication", f"{duration(plan.publication.transfer_s)}; engines stand still for "
                        f"{duration(plan.publication.stall_s)}{again}"),
        ("step", f"{duration(plan.overlapped_s)} where both stages hide each other, "
                 f"{duration(plan.synchronous_s)} one after the other"),
        ("evaluation", f"{duration(plan.evaluation_s)} on the evaluator's engine"),
    ]  # fmt: skip


def _assumptions(plan: Plan) -> list[Row]:
    lengths, cluster, share = plan.lengths, plan.cluster, plan.cluster.efficiency
    text = f"log-normal, median {lengths.median_tokens:,.0f}, σ {lengths.sigma:g}, cut at {lengths.max_tokens:,}"
    return [
        ("lengths", f"{text}: {lengths.mean:,.0f} on average, after prompts of {lengths.prompt_tokens:,.0f}"),
        ("learning", f"{share.learning_flops:.0%} of {cluster.device.flops:.3g} FLOP/s, recomputation included; for "
                     "each parameter and token 2 FLOPs forward, 4 backward, 2 where activations are computed again; as "
                     "many for the critic as for the policy; nothing hides communication"),
        ("decoding", f"weights and keys read at {share.decode_memory:.0%} of {cluster.device.memory_gb_s:,.0f} GB/s, "
                     f"and {share.decode_step_ms:g} ms a step"),
        ("links", f"{share.links:.0%} of {cluster.links.gpu_gb_s:g} GB/s in a node, {cluster.links.network_gb_s:g} "
                  f"between nodes, {cluster.links.host_gb_s:g} to the host"),
    ]  # fmt: skip


def layout_note(plan: Plan, best: Plan | None, *, fits: bool) -> list[str]:
    """A line for a better way to share out the GPUs, if there is one."""
    if best is None or (fits and best.overlapped_s > 0.98 * plan.overlapped_s):
        return []
    settings = f"learner.ranks={best.layout.ranks} launcher.rollout_workers={best.layout.workers}"
    return [f"{settings} {'shares the GPUs out better' if fits else 'fits'}: a step in {duration(best.overlapped_s)}"]


def notes(config: Config, plan: Plan) -> list[str]:
    """What does not stop the run, and is worth knowing; one line each."""
    found = []
    if plan.decoding.slots < config.engine.max_slots:
        found.append(
            f"the KV cache holds {_count(plan.decoding.slots, 'response')} of mean length, engine.max_slots is "
            f"{config.engine.max_slots}: beyond that vLLM interrupts some and computes them again"
        )
    if config.algorithm.dynamic_sampling:
        found.append("algorithm.dynamic_sampling draws groups again; generation takes longer by what it rejects")
    launcher = config.launcher
    if isinstance(launcher, RayLauncherConfig):
        waits = (
            ("stage_timeout_s", plan.synchronous_s, "a step"),
            ("evaluation_timeout_s", plan.evaluation_s, "an evaluation"),
            ("engine_timeout_s", plan.publication.stall_s + plan.recompute_s + plan.decoding.step_s, "a weight update"),
        )
        for name, seconds, what in waits:
            if getattr(launcher, name) < 2 * seconds:
                limit = f"launcher.{name} is {getattr(launcher, name):g} s"
                found.append(f"{limit}, and {what} takes {seconds:,.0f} s on average: set it to {4 * seconds:,.0f}")
    if isinstance(config.learner, DeepSpeedLearnerConfig) and config.learner.offload_parameters:
        found.append("the time of parameters that travel from the host at every pass is not modelled")
    return found


def run_text(config: Config, plan: Plan, step_s: float) -> str:
    """How long the whole run takes with steps of ``step_s``."""
    slower = max(plan.generation_s, plan.pretraining.seconds + plan.publication.transfer_s)
    seconds = config.steps * step_s + config.algorithm.value_pretraining_steps * slower
    gpus = f", {seconds / 3600 * plan.cluster.gpus:,.0f} GPU-hours" if plan.cluster.gpus else ""
    return f"{config.algorithm.value_pretraining_steps} + {config.steps} batches in {duration(seconds)}{gpus}"


def plan_data(plan: Plan, found: Sequence[Misfit], told: Sequence[str]) -> dict[str, Any]:
    """For ``--json``: bytes, seconds, tokens."""
    derived = {
        "learner_peak_bytes": plan.learner.peak(),
        "engine_peak_bytes": plan.engine.memory.peak(),
        "host_bytes": plan.host_bytes,
        "learning_s": plan.learning.seconds,
        "synchronous_s": plan.synchronous_s,
        "overlapped_s": plan.overlapped_s,
        "mean_response_tokens": plan.lengths.mean,
    }
    return {**asdict(plan), **derived, "fits": not found, "misfits": [asdict(m) for m in found], "notes": list(told)}


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{'' if number == 1 else plural}"


def duration(seconds: float) -> str:
    """``0.25 s``, ``41 s``, ``12 min``, ``7.5 h``, ``9.3 days``."""
    for unit, name in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"


def _rows(rows: Sequence[Row]) -> str:
    width = max(len(label) for label, _ in rows)
    lines = []
    for label, value in rows:
        wrapped = textwrap.wrap(value, WIDTH - width - 4, drop_whitespace=False) or [""]
        lines += [f"  {label if not i else '':<{width}}  {part.rstrip()}" for i, part in enumerate(wrapped)]
    return "\n".join(lines)
