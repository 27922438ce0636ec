"""What a run remembers and shows of itself: totals, metrics, accuracies, the live line, the closing summary."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from vapo_async.config import Config
from vapo_async.learner.learner import UpdateResult
from vapo_async.metrics import names
from vapo_async.metrics.console import Console, Phase, StepRow
from vapo_async.metrics.counters import RunTotals
from vapo_async.metrics.evaluation import avg_at_k, avg_at_k_stderr
from vapo_async.metrics.loggers import build_logger, read_metrics
from vapo_async.metrics.report import write_report
from vapo_async.metrics.summary import Summary, TicketCounts, write_summary
from vapo_async.stages import EvaluationResult, FlowStats, StepTimes, TakenBatch

RUN_FILE = "run.json"


class Recorder:
    """Steps count policy updates; the batches of value pretraining are steps ≤ 0.

    Args:
        config: of the run.
        run_dir: where everything is written.
        console: the live line.
    """

    def __init__(self, config: Config, run_dir: Path, console: Console) -> None:
        self._config, self._run_dir, self._console = config, run_dir, console
        self._pretraining = config.algorithm.value_pretraining_steps
        self._log = build_logger(config.logging, run_dir, f"{config.name}-seed{config.seed}", self._pretraining)
        self.totals = RunTotals()
        self._accuracy: dict[int, tuple[float, float]] = {}  # step → avg@k, its standard error
        self._evaluated: dict[str, int] = {}
        self._start = self._step_start = time.perf_counter()
        self._wall_before_s = 0.0
        self._generated_before = 0
        self._last = FlowStats(0, 0.0, 1)
        self.saved_at = -1
        """Batches that the newest checkpoint holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._log.close()
        self._console.close()

    @property
    def batches(self) -> int:
        """Batches trained on, value pretraining included."""
        return self.totals.versions

    @property
    def step(self) -> int:
        """Policy updates so far; 0 while the value is pretrained."""
        return max(0, self.batches - self._pretraining)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.note(text)

    def start_clock(self) -> None:
        """The stages are up: rates count from here."""
        self._step_start = time.perf_counter()

    def batch(self, batch: TakenBatch, result: UpdateResult, stats: FlowStats, times: StepTimes) -> None:
        """A batch was trained on and published."""
        now = time.perf_counter()
        elapsed_s = now - self._step_start
        self._step_start = now
        totals = self.totals
        totals.versions += 1
        totals.policy_batches += result.policy_changed
        totals.value_pretraining_batches += not result.policy_changed
        totals.optimizer_steps += result.policy_steps
        totals.critic_steps += result.critic_steps
        totals.trained_tokens += result.tokens
        totals.generated_tokens = self._generated_before + stats.generated_tokens
        totals.ages.add(batch.ages)
        generation_wait = (stats.generation_wait_s - self._last.generation_wait_s) / (elapsed_s * stats.workers)
        rate = (stats.generated_tokens - self._last.generated_tokens) / elapsed_s
        counters = _counters(stats, self._last)
        self._last = stats
        step = self.batches - self._pretraining
        shown = {
            names.AGE_MEAN: sum(batch.ages) / len(batch.ages),
            names.AGE_MAX: max(batch.ages),
            names.TOKENS_PER_S: rate,
            names.GENERATION_WAIT: min(max(generation_wait, 0.0), 1.0),
            names.LEARNING_WAIT: min(times.waited_s / elapsed_s, 1.0),
            names.STEP_S: elapsed_s,
            names.VERSION: totals.versions,
        }
        self._log.log(step, result.metrics | shown | counters)
        self._show(step, result, shown)

    def evaluation(self, result: EvaluationResult) -> None:
        """A held-out evaluation ended."""
        accuracy, stderr = avg_at_k(result.correct), avg_at_k_stderr(result.correct)
        self._accuracy[result.step] = accuracy, stderr
        self._evaluated = {"problems": len(result.correct), "samples": len(result.correct[0])}
        self._log.log(
            result.step,
            {
                names.HELDOUT_ACCURACY: accuracy,
                names.HELDOUT_STDERR: stderr,
                "heldout_response_length": result.mean_length,
            },
        )

    def evaluated(self, step: int) -> bool:
        return step in self._accuracy

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        self.totals.wall_s = self._wall_s()
        state = {"totals": self.totals.state_dict(), "evaluated": self._evaluated}
        (folder / RUN_FILE).write_text(json.dumps(state, indent=1))

    def load(self, folder: Path) -> None:
        """From a checkpoint; accuracies come from the metrics file, which the run goes on to write."""
        state = json.loads((folder / RUN_FILE).read_text())
        self.totals.load_state_dict(state["totals"])
        self._evaluated = state["evaluated"]
        self.saved_at = self.batches
        self._wall_before_s, self._generated_before = self.totals.wall_s, self.totals.generated_tokens
        self._accuracy = {
            int(row["step"]): (row[names.HELDOUT_ACCURACY], row[names.HELDOUT_STDERR])
            for row in read_metrics(self._run_dir)
            if names.HELDOUT_ACCURACY in row and row["step"] <= self.step
        }

    def finish(self, tickets: dict[str, int], checkpoint: Path, *, interrupted: bool) -> Summary:
        """Writes summary and report and prints the closing table."""
        nothing = (float("nan"), float("nan"))
        base, base_stderr = self._accuracy.get(0, nothing)
        final, final_stderr = self._accuracy[max(self._accuracy)] if self._accuracy else nothing
        totals = self.totals
        summary = Summary(
            base_accuracy=base,
            final_accuracy=final,
            best_accuracy=max((accuracy for accuracy, _ in self._accuracy.values()), default=float("nan")),
            wall_s=self._wall_s(),
            generated_tokens=totals.generated_tokens,
            trained_tokens=totals.trained_tokens,
            versions=totals.versions,
            optimizer_steps=totals.optimizer_steps,
            max_staleness=self._config.buffer.max_staleness,
            max_age=totals.ages.max,
            mean_age=totals.ages.mean,
            age_histogram=totals.ages.state_dict(),
            seed=self._config.seed,
            tickets=TicketCounts(**tickets),
            name=self._config.name,
            status="interrupted" if interrupted else "finished",
            base_stderr=base_stderr,
            final_stderr=final_stderr,
            evaluation=self._evaluated,
        )
        paths = {"run folder": self._run_dir, "summary": write_summary(summary, self._run_dir)}
        paths["report"] = write_report(self._run_dir)
        paths |= {"metrics": self._log.path, "model": checkpoint / "policy", "checkpoint": checkpoint}
        self._console.closing_table(summary.to_dict(), paths)
        return summary

    def _wall_s(self) -> float:
        return self._wall_before_s + time.perf_counter() - self._start

    def _show(self, step: int, result: UpdateResult, shown: dict[str, float]) -> None:
        pretraining = not result.policy_changed
        latest = max(self._accuracy, default=None)
        self._console.step(
            StepRow(
                phase=Phase.value_pretraining if pretraining else Phase.policy,
                step=self.batches if pretraining else step,
                total=self._pretraining if pretraining else self._config.steps,
                remaining=self._pretraining + self._config.steps - self.batches,
                reward=result.metrics[names.REWARD],
                response_length=result.metrics[names.RESPONSE_LENGTH],
                age_mean=shown[names.AGE_MEAN],
                age_max=int(shown[names.AGE_MAX]),
                tokens_per_s=shown[names.TOKENS_PER_S],
                generation_wait=shown[names.GENERATION_WAIT],
                learning_wait=shown[names.LEARNING_WAIT],
                heldout=None if latest is None else self._accuracy[latest][0],
                heldout_base=self._accuracy[0][0] if 0 in self._accuracy else None,
                explained_variance=result.metrics.get(names.EXPLAINED_VARIANCE),
            )
        )


def _counters(stats: FlowStats, before: FlowStats) -> dict[str, float]:
    """The flow's scalars: sums so far, and the mean length of what dynamic sampling refused since ``before``."""
    counters: dict[str, float] = {f"tickets_{key}": n for key, n in stats.flow.tickets.items()}
    counters |= {f"refunds_{reason.replace(' ', '_')}": n for reason, n in stats.flow.refund_reasons.items()}
    counters |= {f"verifier_{key}": n for key, n in stats.verifier.items()}
    counters["prompts_left_out"] = stats.flow.prompts_left_out
    if responses := stats.flow.rejected_responses - before.flow.rejected_responses:
        counters["rejected_length"] = (stats.flow.rejected_tokens - before.flow.rejected_tokens) / responses
    return counters
