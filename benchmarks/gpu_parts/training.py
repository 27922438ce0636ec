"""A whole step of the learner, policy and critic, on synthetic long-tailed responses; its MFU, and what a plan says.

The model has random weights. FLOPs are ``vapo_async.planning``'s: 2 for each parameter and token of a forward pass, 4
of a backward pass, and those of attention. MFU counts what the method needs, so nothing twice that is computed again
(activations, tiles of logits), no optimizer, and no output embedding for the critic, which has none. The plan counts
otherwise: what is computed again, too, and a critic as large as the policy. ``efficiency.learning_flops`` is the number
of that name in a cluster's file with which the plan would have said what was measured.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from engine_speed.workloads import LONG_TAILED, Sizes, make_workload
from plan_memory import write_model

from gpu_parts.devices import device_name, no_peak, own_cluster, peak_of
from gpu_parts.sections import Line, Report, Task, synchronize
from vapo_async.build import BaseModel, build_learner
from vapo_async.config import Config
from vapo_async.config.load import load_config
from vapo_async.planning.cluster import GIB, Cluster, read_cluster
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.memory import Sharing, learner_memory
from vapo_async.planning.plan import make_plan, pass_of
from vapo_async.planning.shapes import KNOWN, ModelShape
from vapo_async.planning.speed import Batch, learning
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Score, Ticket, make_trajectory, set_score

ROOM: Final = 1.2
"""A model is trained where so many times the memory that the plan's model says is free."""


@dataclass(frozen=True)
class Work:
    """What is trained on what."""

    shape: ModelShape
    groups: int
    group_size: int
    minibatches: int
    prompt_tokens: int
    lengths: Sizes
    """Of the responses: a median, and where they are cut."""
    tokens_per_microbatch: int
    repeats: int

    @property
    def responses(self) -> int:
        return self.groups * self.group_size

    def drawn(self) -> list[int]:
        """Tokens of each response, long-tailed."""
        return make_workload(LONG_TAILED, self.responses, self.lengths).lengths


def _lengths(median_tokens: int, longest_tokens: int) -> Sizes:
    return Sizes((), 0, median_tokens, longest_tokens, repeats=0, update_tokens=0, update_rounds=0, requests_per_slot=1)


TINY: Final = ModelShape("tiny", 128, 2, 2, 1, 64, 256, 512, tied=True, attention_bias=True)
FULL: Final = Work(KNOWN["Qwen/Qwen2.5-0.5B"], 4, 8, 2, 128, _lengths(1024, 7936), 16_384, repeats=5)
QUICK: Final = Work(TINY, 2, 4, 2, 8, _lengths(24, 200), 256, repeats=3)


@dataclass(frozen=True)
class Row:
    """One way to train."""

    model: str
    dtype: str
    activation_checkpointing: bool
    responses: int
    tokens: int
    """Of prompts and responses."""
    model_flops: float
    step_s: float | None = None
    """Median; this and what follows are None where the memory was not enough."""
    steps_s: tuple[float, ...] = ()
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_flops: float | None = None
    note: str | None = None
    """Why a number is missing."""
    peak_gib: float | None = None
    """Of memory that torch took; GPUs only."""
    modelled_gib: float | None = None
    planned_with: str | None = None
    """A cluster's name."""
    planned_s: float | None = None
    learning_flops: float | None = None
    """A cluster file's ``efficiency.learning_flops`` with which ``planned_s`` would be ``step_s``."""


@dataclass(frozen=True)
class Drawn(ResponseLengths):
    """Lengths that are known one by one."""

    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokens: Sequence[int], prompt_tokens: int) -> "Drawn":
        return cls(median(tokens), 0.0, max(tokens), prompt_tokens, tuple(tokens))

    def moment(self, k: int) -> float:
        return sum(length**k for length in self.tokens) / len(self.tokens)


def measure(task: Task, report: Report) -> None:
    """Without activation checkpointing, which takes more memory, after with it."""
    work = QUICK if task.quick else FULL
    folder = model_folder(work.shape, task.scratch)
    for checkpointing in (True, False):
        row = measure_one(work, config_for(work, folder, task.device, checkpointing), task.device)
        what = f"{row.model}, {row.dtype}, {'with' if checkpointing else 'no'} activation checkpointing"
        report(Line(what, "" if row.step_s is None else f"{row.step_s:,.3f} s a step", told(row), asdict(row)))


def told(row: Row) -> str:
    """A row in words."""
    if row.step_s is None:
        return row.note or ""
    parts = [f"{row.tokens_per_s:,.0f} tokens/s", row.note if row.mfu is None else f"MFU {row.mfu:.1%}"]
    if row.planned_s is not None:
        parts.append(f"planned {row.planned_s:,.3f} s with {row.planned_with}")
    if row.peak_gib is not None and row.modelled_gib is not None:
        parts.append(f"{row.peak_gib:.1f} GiB, planned {row.modelled_gib:.1f}")
    return ", ".join(filter(None, parts))


def model_folder(shape: ModelShape, scratch: Path) -> Path:
    """Random weights in a Hugging Face folder; written once, whole or not at all."""
    folder = scratch / "model"
    if not folder.exists():
        unfinished = scratch / f"model-{time.monotonic_ns()}"
        write_model(shape, unfinished)
        unfinished.rename(folder)
    return folder


def config_for(work: Work, folder: Path, device: str, checkpointing: bool) -> Config:
    """One policy and one critic update for each mini-batch; bfloat16 on a GPU."""
    settings = {
        "model.path": folder,
        "model.dtype": "bfloat16" if device == "cuda" else "float32",
        "algorithm.groups_per_batch": work.groups,
        "algorithm.group_size": work.group_size,
        "algorithm.minibatches": work.minibatches,
        "algorithm.value_pretraining_steps": 0,
        "task.max_prompt_tokens": work.prompt_tokens,
        "task.max_response_tokens": work.lengths.longest_tokens,
        "engine.device": device,
        "engine.max_mismatch": 1e9,  # the log-probs of the batch are made up
        "learner.device": device,
        "learner.max_tokens_per_microbatch": work.tokens_per_microbatch,
        "learner.activation_checkpointing": checkpointing,
        "learner.mismatch_versions": 0,  # no passes but those of the method
    }
    launcher = "inline" if device == "cpu" else "ray"  # as a plan wants it; nothing is launched
    return load_config(["model=folder", f"launcher={launcher}", *(f"{key}={value}" for key, value in settings.items())])


def model_flops(work: Work, lengths: ResponseLengths) -> float:
    """Of a step: a pass before the updates and an update, of policy and critic each."""
    cluster = read_cluster("laptop")  # FLOPs do not depend on it
    policy = Batch(work.responses, work.minibatches, 1, 0, 1, work.tokens_per_microbatch, checkpointing=False)
    critic = replace(policy, critic_updates=1, policy_updates=0)
    no_embedding = replace(work.shape, vocabulary=0)
    return sum(
        learning(shape, batch, lengths, Sharing(), 1, cluster).flops
        for shape, batch in ((work.shape, policy), (no_embedding, critic))
    )


def modelled_bytes(work: Work, config: Config) -> float:
    """Of the device's memory at its peak, by the plan's model."""
    return learner_memory(work.shape, Sharing(), pass_of(config)).peak()


def measure_one(work: Work, config: Config, device: str) -> Row:
    """Steps of one learner, which is gone afterwards."""
    lengths, name = work.drawn(), device_name(device)
    known = Drawn.of(lengths, work.prompt_tokens)
    row = Row(
        model=work.shape.name,
        dtype=config.model.dtype,
        activation_checkpointing=config.learner.activation_checkpointing,
        responses=work.responses,
        tokens=sum(lengths) + work.responses * work.prompt_tokens,
        model_flops=model_flops(work, known),
        modelled_gib=modelled_bytes(work, config) / GIB,
    )
    if device == "cuda":
        wanted, free = ROOM * modelled_bytes(work, config), torch.cuda.mem_get_info()[0]
        if wanted > free:
            return replace(row, note=f"not run: wants {wanted / GIB:.1f} GiB, {free / GIB:.1f} are free")
        torch.cuda.reset_peak_memory_stats()
    steps_s = times_of_steps(work, config, device, lengths)
    peak_gib = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    return judged(replace(row, steps_s=tuple(steps_s), peak_gib=peak_gib), config, known, name, own_cluster(device))


def times_of_steps(work: Work, config: Config, device: str, lengths: Sequence[int]) -> list[float]:
    """Seconds of each step but the first, which makes the optimizers' states."""
    folder = Path(config.model.path)  # type: ignore[attr-defined]
    learner = build_learner(config, BaseModel(folder, folder))
    found = []
    for version in range(1 + work.repeats):
        batch = trajectories(work, lengths, version)
        synchronize(device)
        start = time.perf_counter()
        learner.update(batch, version)
        synchronize(device)
        found.append(time.perf_counter() - start)
    del learner
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return found[1:]


def trajectories(work: Work, lengths: Sequence[int], version: int) -> list[Any]:
    """Random tokens of the present version, every other response right."""
    vocabulary, made = work.shape.vocabulary, []
    generator = torch.Generator().manual_seed(version)
    for i, length in enumerate(lengths):
        drawn = torch.randint(0, vocabulary, (work.prompt_tokens + length,), generator=generator).tolist()
        log_probs = [-math.log(vocabulary)] * length  # about what random weights give
        response = Response(
            i % work.group_size, drawn[work.prompt_tokens :], log_probs, [version] * length, FinishReason.STOP
        )
        group = i // work.group_size
        prompt = Prompt(group, Problem(group, "", ""), "", tuple(drawn[: work.prompt_tokens]))
        made.append(make_trajectory(prompt, Ticket(group, version), response))
        set_score(made[-1], Score(i % 2 == 0, 1.0 if i % 2 == 0 else -1.0))
    return made


def judged(row: Row, config: Config, lengths: ResponseLengths, name: str, cluster: Cluster | None) -> Row:
    """Beside the device's peak and a plan, where it is known."""
    step_s, peak = median(row.steps_s), peak_of(name)
    row = replace(row, step_s=step_s, tokens_per_s=row.tokens / step_s)
    if peak is None:
        row = replace(row, note=no_peak(name))
    else:
        row = replace(row, mfu=row.model_flops / step_s / peak.flops, peak_flops=peak.flops)
    if cluster is None:
        return row
    planned = make_plan(config, cluster, lengths).learning
    rest = planned.seconds - planned.compute_s
    share = planned.flops / cluster.device.flops / (step_s - rest) if step_s > rest else None
    return replace(row, planned_with=cluster.name, planned_s=planned.seconds, learning_flops=share)
