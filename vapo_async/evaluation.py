"""One model on a task's held-out problems: avg@k, pass@k, greedy accuracy, lengths and speed.

``scripts/evaluate.py`` is its command line. The problems are the ones that training evaluates on, in the same order.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vapo_async.build import BaseModel, HeldOut, build_evaluator, build_heldout, build_verifier, ensure_base
from vapo_async.checkpoint import CHECKPOINTS, POLICY_FOLDER, checkpoint_of
from vapo_async.collector.vllm_environment import check_vllm
from vapo_async.config import Config, ConfigError, FolderModelConfig, VLLMEngineConfig
from vapo_async.config.load import load_config, read_config, to_dict
from vapo_async.config.saved import CONFIG_FILE, lay_over
from vapo_async.metrics.console import format_duration
from vapo_async.metrics.evaluation import avg_at_k, avg_at_k_stderr, mean_pass_at_k
from vapo_async.models.load import load_tokenizer
from vapo_async.prompts.tasks import build_task
from vapo_async.stages import Scorer
from vapo_async.verifier.scoring import ScoreRequest


def evaluation_config(
    folder: str | None, overrides: Sequence[str], note: Callable[[str], None] = lambda _: None
) -> tuple[Config, Path | None]:
    """What to evaluate and how; and the file that the settings come from (None: the shipped configuration).

    Args:
        folder: a run's folder (its newest whole checkpoint), a checkpoint, a checkpoint's ``policy/``, any other
            Hugging Face folder or a hub name; None takes the model that ``model=…`` or ``experiment=…`` in
            ``overrides`` says. What lies inside a run is evaluated with the run's own settings.
        overrides: as for training; they win over the run's settings.
        note: told of broken checkpoints that are left out.
    """
    keys = {override.partition("=")[0] for override in overrides}
    if folder is None:
        if not {"model", "experiment"} & keys:
            hint = "give the folder of a run, a checkpoint or a model, or model=… (experiment=… has one too)"
            raise ConfigError(f"nothing to evaluate: {hint}")
        return load_config(overrides), None
    for key in ("model", "model.path"):
        if key in keys:
            raise ConfigError(f"{folder} is the model to evaluate: leave out either it or {key}=…")
    model = _policy_folder(folder, note)
    saved = _run_config(Path(model))
    if saved is None:
        config = load_config(["model=folder", "model.path=given", *overrides])
    else:
        run = read_config(saved)
        config = lay_over(replace(run, model=FolderModelConfig(dtype=run.model.dtype, path="given")), overrides)
    assert isinstance(config.model, FolderModelConfig)
    return replace(config, model=replace(config.model, path=model)), saved


def _policy_folder(given: str, note: Callable[[str], None]) -> str:
    """The model's folder in what the user gave; anything unknown goes back as it came."""
    checkpoint = checkpoint_of(Path(given).expanduser(), note)
    return given if checkpoint is None else str(checkpoint / POLICY_FOLDER)


def _run_config(model: Path) -> Path | None:
    """``config.yaml`` of the run that ``run/checkpoints/step_000030/policy`` lies in."""
    parts = model.absolute().parents
    if len(parts) < 3 or model.name != POLICY_FOLDER or parts[1].name != CHECKPOINTS:
        return None
    saved = parts[2] / CONFIG_FILE
    return saved if saved.is_file() else None


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Shares are in [0, 1], standard errors clustered over problems (None: a single problem)."""

    model: str
    task: str
    problems: int
    left_out: int
    """Held-out problems that nobody is asked because their prompt is longer than ``task.max_prompt_tokens``."""
    samples: int
    """k: responses to each problem."""
    temperature: float
    top_p: float
    avg_at_k: float
    avg_at_k_stderr: float | None
    pass_at_k: dict[int, float]
    greedy_accuracy: float
    greedy_stderr: float | None
    mean_response_tokens: float
    """Of the sampled responses, the end token included."""
    truncated: float
    """Share of the sampled responses that the length limit cut."""
    generated_tokens: int
    """Greedy responses included."""
    tokens_per_s: float
    """Generated tokens by the time that generation took; loading and judging left out."""
    config: dict[str, Any]

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values of the closing table."""
        left_out = f" ({self.left_out} with a prompt over task.max_prompt_tokens left out)" if self.left_out else ""
        sampling = f"T = {self.temperature:g}, top-p {self.top_p:g}"
        return [
            ("model", self.model),
            ("task", self.task),
            (f"avg@{self.samples}", f"{self.avg_at_k:.1%}{_plus_minus(self.avg_at_k_stderr)}"),
            *((f"pass@{k}", f"{share:.1%}") for k, share in self.pass_at_k.items()),
            ("greedy", f"{self.greedy_accuracy:.1%}{_plus_minus(self.greedy_stderr)}"),
            ("mean response", f"{self.mean_response_tokens:.1f} tokens"),
            ("cut by the limit", f"{self.truncated:.1%}"),
            ("problems", f"{self.problems:,}{left_out}"),
            ("samples", f"{self.samples} per problem at {sampling}, and a greedy one"),
            ("speed", f"{self.tokens_per_s:,.0f} tokens/s, {self.generated_tokens:,} tokens"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {**vars(self), "pass_at_k": {str(k): share for k, share in self.pass_at_k.items()}}


def evaluate_model(config: Config, note: Callable[[str], None], progress: Callable[[str], None]) -> Evaluation:
    """Samples ``evaluation.samples`` responses to each held-out problem and one greedily, and judges them.

    Args:
        config: its ``model`` is what is evaluated; torch gets ``learner.threads`` threads.
        note: told what stays on the screen; ``progress``: told where things stand, often.
    """
    if isinstance(config.engine, VLLMEngineConfig):
        check_vllm()
    torch.set_num_threads(config.learner.threads)
    settings = config.evaluation
    task = build_task(config.task, config.seed)
    base = ensure_base(config, note)
    fitting = build_heldout(config, task, load_tokenizer(base.tokenizer), len(task.heldout))
    asked = settings.problems
    heldout = HeldOut(fitting.problems[:asked], fitting.prompts[:asked])
    greedy_config = replace(config, evaluation=replace(settings, temperature=0.0))
    line = _ProgressLine(len(heldout.problems) * (settings.samples + 1), progress)
    with build_verifier(config) as verifier:
        sampled = _Pass(f"avg@{settings.samples}").run(config, base, heldout, verifier, settings.samples, line)
        greedy = _Pass("greedy").run(greedy_config, base, heldout, verifier, 1, line)
    ks = [k for k in (2**i for i in range(settings.samples.bit_length())) if k < settings.samples]
    tokens = sum(sampled.lengths) + sum(greedy.lengths)
    return Evaluation(
        model=str(base.model),
        task=task.name,
        problems=len(heldout.problems),
        left_out=len(task.heldout) - len(fitting.problems),
        samples=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        avg_at_k=avg_at_k(sampled.correct),
        avg_at_k_stderr=_known(avg_at_k_stderr(sampled.correct)),
        pass_at_k={k: mean_pass_at_k(sampled.correct, k) for k in (*ks, settings.samples)},
        greedy_accuracy=avg_at_k(greedy.correct),
        greedy_stderr=_known(avg_at_k_stderr(greedy.correct)),
        mean_response_tokens=sum(sampled.lengths) / len(sampled.lengths),
        truncated=sum(sampled.truncated) / len(sampled.truncated),
        generated_tokens=tokens,
        tokens_per_s=tokens / (sampled.generation_s + greedy.generation_s),
        config=to_dict(config),
    )


class _ProgressLine:
    """``avg@4: 96/256 problems · 71.2% right so far · 9,500 tokens/s · eta 0:12``; ETA over all passes."""

    def __init__(self, responses: int, show: Callable[[str], None]) -> None:
        self._left, self._done, self._show = responses, 0, show
        self._start = time.perf_counter()

    def update(self, of: "_Pass", responses: int) -> None:
        """``of`` got ``responses`` more."""
        self._done, self._left = self._done + responses, self._left - responses
        eta_s = (time.perf_counter() - self._start) / self._done * self._left
        judged = [row for row in of.correct if row]
        self._show(
            f"{of.label}: {len(judged)}/{len(of.correct)} problems · {avg_at_k(judged):.1%} right so far · "
            f"{sum(of.lengths) / of.generation_s:,.0f} tokens/s · eta {format_duration(eta_s)}"
        )


@dataclass
class _Pass:
    """All problems once, at one temperature."""

    label: str
    correct: list[list[bool]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    generation_s: float = 0.0

    def run(
        self, config: Config, base: BaseModel, heldout: HeldOut, verifier: Scorer, samples: int, line: _ProgressLine
    ) -> "_Pass":
        with closing(build_evaluator(config, base)) as evaluator:
            self.correct = [[] for _ in heldout.problems]
            since = time.perf_counter()
            for place, responses in evaluator.stream(heldout.prompts, samples):
                self.generation_s += time.perf_counter() - since
                self.lengths += responses.lengths
                self.truncated += responses.truncated
                problem = heldout.problems[place]
                pairs = zip(responses.texts, responses.lengths, strict=True)
                scores = verifier.score([ScoreRequest(problem, text, length) for text, length in pairs])
                self.correct[place] = [score.correct for score in scores]
                line.update(self, samples)
                since = time.perf_counter()
        return self


def _known(stderr: float) -> float | None:
    return stderr if math.isfinite(stderr) else None


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.1%}"
