"""The plan's memory model beside measured peaks: the real learner trains one mini-batch of two micro-batches.

    python benchmarks/plan_memory.py --json plan_memory.json      two minutes on one core, 7 GiB of memory
    python benchmarks/plan_memory.py --quick                       the tiny model alone: does it run?

Each case has a process of its own: a model of random weights, policy and critic in float32, plain torch. The first
mini-batch makes AdamW's moments; measured is the peak of what tensors take up to the end of the second one: what is
alive before the first, and every allocation and release after it, as torch's profiler has them. Python, libraries and
fragmentation are not in it. The model is ``learner_memory``, which ``scripts/plan.py`` plans with.

Demanded: model and measurement differ by 15 % at most. Exit code 1 where they differ by more.
"""

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench import announce, command_line, environment, parse
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vapo_async.build import BaseModel, build_learner
from vapo_async.config import Config, EmbeddedModelConfig
from vapo_async.config.load import load_config
from vapo_async.planning.memory import Memory, Sharing, learner_memory
from vapo_async.planning.plan import pass_of
from vapo_async.planning.shapes import SMOLLM2, ModelShape, shape_of
from vapo_async.schema import FinishReason, Problem, Prompt, Response, Score, Ticket, make_trajectory, set_score

MIB = 1 << 20
BOUND = 0.15
MICROBATCHES = 2


@dataclass(frozen=True)
class Case:
    """One model, and how it is trained."""

    model: str
    """``tiny`` or ``smollm2``."""
    tokens: int
    """Of a micro-batch, which is one response."""
    critic: bool = True
    older_policies: int = 1
    layers: int | None = None
    """Fewer than the model has."""


QUICK = (Case("tiny", 2048), Case("tiny", 512), Case("tiny", 2048, critic=False, older_policies=0))
FULL = (*QUICK, Case("smollm2", 128), Case("smollm2", 1024), Case("smollm2", 1024, older_policies=0, layers=8))


@dataclass(frozen=True)
class Row:
    """One case; MiB."""

    case: Case
    modelled_mib: float
    measured_mib: float
    parts_mib: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.modelled_mib / self.measured_mib


def shape_for(case: Case) -> ModelShape:
    """The tiny model's or SmolLM2's."""
    shape = shape_of(EmbeddedModelConfig()) if case.model == "tiny" else SMOLLM2
    return shape if case.layers is None else replace(shape, layers=case.layers)


def write_model(shape: ModelShape, folder: Path) -> None:
    """Random weights of that shape as a Hugging Face folder."""
    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 8192,
    }
    torch.manual_seed(0)
    model: Any = (
        Qwen2ForCausalLM(Qwen2Config(**sizes)) if shape.attention_bias else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    model.save_pretrained(folder)


def config_for(case: Case, folder: Path) -> Config:
    """One prompt, two responses, one mini-batch."""
    settings = {
        "model.path": folder,
        "algorithm.advantage": "gae" if case.critic else "group",
        "algorithm.groups_per_batch": 1,
        "algorithm.group_size": MICROBATCHES,
        "algorithm.minibatches": 1,
        "algorithm.value_pretraining_steps": 0,
        "task.max_prompt_tokens": 1,
        "task.max_response_tokens": case.tokens - 1,
        "engine.max_mismatch": 1e9,  # the log-probs below are made up
        "learner.max_tokens_per_microbatch": case.tokens,
        "learner.mismatch_versions": case.older_policies,
    }
    return load_config(["model=folder", "launcher=inline", *(f"{key}={value}" for key, value in settings.items())])


def trajectories(case: Case, vocabulary: int) -> list[Any]:
    """Responses at full length, one of them right."""
    length, made = case.tokens - 1, []
    for i in range(MICROBATCHES):
        tokens = torch.randint(0, vocabulary, (length,)).tolist()
        response = Response(i, tokens, [-1.0] * length, [0] * length, FinishReason.STOP)
        made.append(make_trajectory(Prompt(0, Problem(0, "", ""), "", (1,)), Ticket(0, 0), response))
        set_score(made[-1], Score(i == 0, 1.0 if i == 0 else -1.0))
    return made


def measure(case: Case) -> float:
    """Bytes. For a process that does nothing else."""
    torch.set_num_threads(1)
    shape = shape_for(case)
    with tempfile.TemporaryDirectory(prefix="vapo-async-plan-memory-") as scratch:
        folder = Path(scratch)
        write_model(shape, folder)
        learner = build_learner(config_for(case, folder), BaseModel(folder, folder))
    batch = trajectories(case, shape.vocabulary)
    gc.collect()
    before = alive_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for version in range(2):
            learner.update(batch, version)
    return before + highest(profiler)


def alive_bytes() -> int:
    """Of all tensors' memory, each once."""
    storages = [tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def highest(profiler: profile) -> int:
    """The largest sum of allocations less releases, at any moment."""
    kinds = torch._C._profiler._EventType
    tree = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    found = [
        (event.start_time_ns, event.extra_fields.alloc_size) for event in walk(tree) if event.tag == kinds.Allocation
    ]
    level = most = 0
    for _, size in sorted(found, key=lambda each: each[0]):
        level += size
        most = max(most, level)
    return most


def walk(events: Any) -> Iterator[Any]:
    """All events of a tree."""
    stack = list(events)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def modelled(case: Case) -> Memory:
    """What the plan says of the same configuration."""
    return learner_memory(shape_for(case), Sharing(), pass_of(config_for(case, Path("unread"))))


def row_of(case: Case) -> Row:
    """Measured in a new process."""
    command = [sys.executable, __file__, "--measure", json.dumps(asdict(case))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    memory = modelled(case)
    parts = {part.name: part.bytes / MIB for part in memory.parts}
    return Row(case, memory.peak() / MIB, float(output.splitlines()[-1]) / MIB, parts)


def table(row: Row) -> str:
    """A line, and the model's largest parts."""
    case, parts = row.case, sorted(row.parts_mib.items(), key=lambda part: -part[1])[:4]
    name = case.model if case.layers is None else f"{case.model}, {case.layers} layers"
    critic = "with critic" if case.critic else "no critic"
    named = " · ".join(f"{part} {size:,.1f}" for part, size in parts)
    return (
        f"{name:<18} {case.tokens:>5} tokens {critic:<12} {row.modelled_mib:>9,.1f} {row.measured_mib:>9,.1f} "
        f"{row.ratio:>6.3f}   {named}"
    )


def main(arguments: list[str]) -> int:
    """Runs all cases; says where model and measurement differ by too much."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--measure", metavar="CASE", help="one case as JSON: prints its peak in bytes, and nothing else"
    )
    options = parse(parser, arguments)
    if options.measure is not None:
        print(measure(Case(**json.loads(options.measure))))
        return 0
    found = environment()
    announce(found)
    print(f"{'':<44} {'model':>9} {'measured':>9}  ratio   largest parts, MiB")
    rows = []
    for case in QUICK if options.quick else FULL:
        rows.append(row_of(case))
        print(table(rows[-1]), flush=True)
    if options.json is not None:
        written = [asdict(row) | {"ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps({"environment": found, "rows": written}, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in rows if abs(row.ratio - 1) > BOUND]
    print(f"{'FAILS' if wrong else 'holds'}: model and measurement differ by at most {BOUND:.0%} (demanded)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
