"""What a run remembers and shows of itself: totals, metrics, the ledger, accuracies, the live line, the summary."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from vapo_async.config import Config
from vapo_async.learner.learner import UpdateResult
from vapo_async.metrics import names
from vapo_async.metrics.console import Console, Phase, StepRow
from vapo_async.metrics.counters import RunTotals
from vapo_async.metrics.evaluation import avg_at_k, avg_at_k_stderr
from vapo_async.metrics.flow_sums import FlowSums, increases, length_bias, plus
from vapo_async.metrics.ledger import FlowLedger
from vapo_async.metrics.loggers import build_logger, read_metrics
from vapo_async.metrics.report import write_report
from vapo_async.metrics.summary import LengthCounts, Summary, TicketCounts, write_summary
from vapo_async.stages import EvaluationResult, FlowStats, StepTimes, TakenBatch

RUN_FILE = "run.json"


class Recorder:
    """Steps count policy updates; the batches of value pretraining are steps ≤ 0.

    Args:
        config: of the run.
        run_dir: where everything is written.
        console: the live line.
        clock: seconds.
    """

    def __init__(
        self, config: Config, run_dir: Path, console: Console, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._config, self._run_dir, self._console = config, run_dir, console
        self._pretraining = config.algorithm.value_pretraining_steps
        self._log = build_logger(config.logging, run_dir, f"{config.name}-seed{config.seed}", self._pretraining)
        self._ledger = FlowLedger(run_dir)
        self.totals = RunTotals()
        self.flow = FlowSums()
        """The flow's sums as of the stats seen last."""
        self._row = FlowSums()  # as of the last row: the next one holds what came since
        self._accuracy: dict[int, tuple[float, float]] = {}  # step → avg@k, its standard error
        self._evaluated: dict[str, int] = {}
        self._clock = clock
        self._start, self._step_start = clock(), math.inf  # no turn before the clock is started
        self._wall_before_s = self._turn_before_s = 0.0  # of the run, and of its unfinished turn, before this process
        self._last = FlowStats(0, 0.0, 1)  # of this process: what it counts starts anew with each part of a run
        self.saved_at = -1
        """Batches that the newest checkpoint holds."""
        self.checkpoint: Path | None = None
        """The newest one of the history that this run goes on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._log.close()
        self._ledger.close()
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
        self._step_start = self._clock() - self._turn_before_s

    def batch(self, batch: TakenBatch, result: UpdateResult, stats: FlowStats, times: StepTimes) -> None:
        """A batch was trained on and published."""
        now = self._clock()
        elapsed_s = now - self._step_start
        self._step_start = now
        totals = self.totals
        totals.versions += 1
        totals.policy_batches += result.policy_changed
        totals.value_pretraining_batches += not result.policy_changed
        totals.optimizer_steps += result.policy_steps
        totals.critic_steps += result.critic_steps
        totals.trained_tokens += result.tokens
        totals.ages.add(batch.ages)
        self._observe(stats)
        turn = {
            names.LEARNING_WAIT_S: times.waited_s,
            names.LEARNING_S: times.learned_s,
            names.PUBLICATION_S: times.published_s,
        }
        self.flow.seconds = plus(self.flow.seconds, turn)
        recent = self.flow.since(self._row)
        step = self.batches - self._pretraining
        shown = {
            names.AGE_MIN: min(batch.ages),
            names.AGE_MEAN: sum(batch.ages) / len(batch.ages),
            names.AGE_MAX: max(batch.ages),
            names.TOKENS_PER_S: recent.generated_tokens / elapsed_s,
            names.GENERATION_WAIT: min(recent.seconds[names.GENERATION_WAIT_S] / (elapsed_s * stats.workers), 1.0),
            names.LEARNING_WAIT: min(times.waited_s / elapsed_s, 1.0),
            names.STEP_S: elapsed_s,
            names.VERSION: totals.versions,
        }
        self._log.log(step, result.metrics | shown | recent.seconds | _lengths(recent) | self._counters(stats))
        outstanding = stats.flow.tickets.get("outstanding", 0)
        self._ledger.write(totals.versions, step, batch.tickets, batch.group_ids, batch.ages, outstanding, recent)
        self._row = self.flow.copy()  # not before it is written: a full disk must not cost a row
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

    def save(self, folder: Path, stats: FlowStats | None = None) -> None:
        """Into a checkpoint; ``stats`` of this moment add what came since the last batch, where they can be had."""
        if stats is not None:
            self._observe(stats)
        self.totals.wall_s = self._wall_s()
        state = {
            "totals": self.totals.state_dict(),
            "flow": self.flow.to_json(),
            "row": self._row.to_json(),
            "turn_s": max(self._clock() - self._step_start, 0.0),
            "evaluated": self._evaluated,
        }
        (folder / RUN_FILE).write_text(json.dumps(state, indent=1))

    def load(self, folder: Path, stats: FlowStats) -> None:
        """From a checkpoint; accuracies come from the metrics file, which the run goes on to write.

        Args:
            folder: of the checkpoint.
            stats: of the stages after they loaded it. Only what comes on top of them is new: some stages go on with
                the counters of the checkpoint, others start at 0.
        """
        state = json.loads((folder / RUN_FILE).read_text())
        self.totals.load_state_dict(state["totals"])
        self.flow, self._row = FlowSums.from_json(state["flow"]), FlowSums.from_json(state["row"])
        self._evaluated, self._turn_before_s = state["evaluated"], state["turn_s"]
        self._last = stats
        self.saved_at = self.batches
        self._wall_before_s = self.totals.wall_s
        self._accuracy = {
            int(row["step"]): (row[names.HELDOUT_ACCURACY], row[names.HELDOUT_STDERR])
            for row in read_metrics(self._run_dir)
            if names.HELDOUT_ACCURACY in row and row["step"] <= self.step
        }

    def finish(self, stats: FlowStats, checkpoint: Path, *, interrupted: bool) -> Summary:
        """Writes summary and report and prints the closing table."""
        self._observe(stats)
        nothing = (float("nan"), float("nan"))
        base, base_stderr = self._accuracy.get(0, nothing)
        final, final_stderr = self._accuracy[max(self._accuracy)] if self._accuracy else nothing
        totals, flow = self.totals, self.flow
        bias = length_bias(flow.lengths)
        summary = Summary(
            base_accuracy=base,
            final_accuracy=final,
            best_accuracy=max((accuracy for accuracy, _ in self._accuracy.values()), default=float("nan")),
            wall_s=self._wall_s(),
            generated_tokens=flow.generated_tokens,
            trained_tokens=totals.trained_tokens,
            versions=totals.versions,
            optimizer_steps=totals.optimizer_steps,
            max_staleness=self._config.buffer.max_staleness,
            max_age=totals.ages.max,
            mean_age=totals.ages.mean,
            age_histogram=totals.ages.state_dict(),
            seed=self._config.seed,
            tickets=TicketCounts(**stats.flow.tickets),
            name=self._config.name,
            status="interrupted" if interrupted else "finished",
            base_stderr=base_stderr,
            final_stderr=final_stderr,
            evaluation=self._evaluated,
            refund_reasons=flow.refunds,
            lengths={kind: LengthCounts(n.responses, _known(n.mean)) for kind, n in flow.lengths.items()},
            length_bias=_known(bias),
            seconds=flow.seconds,
            restarts=flow.restarts,
        )
        paths = {"run folder": self._run_dir, "summary": write_summary(summary, self._run_dir)}
        paths["report"] = write_report(self._run_dir)
        paths |= {"metrics": self._log.path, "model": checkpoint / "policy", "checkpoint": checkpoint}
        self._console.closing_table(summary.to_dict(), paths)
        return summary

    def _observe(self, stats: FlowStats) -> None:
        """Adds what came since the stats seen last."""
        last, flow = self._last, self.flow
        self._last = stats
        flow.generated_tokens += max(stats.generated_tokens - last.generated_tokens, 0)
        flow.seconds = plus(flow.seconds, increases(_waits(stats), _waits(last)))
        flow.verifier = plus(flow.verifier, increases(stats.verifier, last.verifier))
        flow.restarts = plus(flow.restarts, increases(stats.restarts, last.restarts))
        # The flow itself counts over resumes.
        flow.committed = stats.flow.tickets.get("committed", 0)
        flow.refunds = dict(stats.flow.refund_reasons)
        flow.lengths = dict(stats.flow.lengths)

    def _counters(self, stats: FlowStats) -> dict[str, float]:
        """Sums so far."""
        counters: dict[str, float] = {f"tickets_{key}": n for key, n in stats.flow.tickets.items()}
        counters |= {names.REFUNDS + reason.replace(" ", "_"): n for reason, n in self.flow.refunds.items()}
        counters |= {f"verifier_{key}": n for key, n in self.flow.verifier.items()}
        return counters | {
            "prompts_left_out": stats.flow.prompts_left_out,
            names.RESTARTS: sum(self.flow.restarts.values()),
        }

    def _wall_s(self) -> float:
        return self._wall_before_s + self._clock() - self._start

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


def _waits(stats: FlowStats) -> dict[str, float]:
    return {names.GENERATION_WAIT_S: stats.generation_wait_s, names.VERDICT_WAIT_S: stats.verdict_wait_s}


def _lengths(recent: FlowSums) -> dict[str, float]:
    """Mean lengths of the responses since the last batch, of the kinds that had any."""
    means = {names.LENGTH + kind: lengths.mean for kind, lengths in recent.lengths.items()}
    means[names.LENGTH_BIAS] = length_bias(recent.lengths)
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
