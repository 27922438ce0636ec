"""What a run writes down of its flow, from synthetic counters: rows by hand, and resumes that count nothing twice."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vapo_async.buffer.lengths import DROPPED, GENERATED, KINDS, REFUSED, TRAINED, LengthAudit
from vapo_async.config import Config, InlineLauncherConfig
from vapo_async.flow import FlowCounters
from vapo_async.learner.learner import UpdateResult
from vapo_async.metrics import names
from vapo_async.metrics.console import Console
from vapo_async.metrics.ledger import read_flow
from vapo_async.metrics.loggers import read_metrics
from vapo_async.recorder import Recorder
from vapo_async.stages import EvaluationResult, FlowStats, StepTimes, TakenBatch

RESULT = UpdateResult(
    {names.REWARD: 0.5, names.RESPONSE_LENGTH: 5.0}, tokens=40, policy_steps=4, critic_steps=4, policy_changed=True
)
TIMES = StepTimes(waited_s=0.5, learned_s=1.0, published_s=0.25)


@dataclass
class Process:
    """One process's part of a run: a clock, the flow's counters, and the counters of the stages."""

    audit: LengthAudit = field(default_factory=LengthAudit)
    tickets: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("charged", "committed", "refunded"), 0))
    reasons: dict[str, int] = field(default_factory=lambda: {"all right": 0})
    tokens: int = 0
    idle_s: float = 0.0
    verdict_s: float = 0.0
    restarts: dict[str, int] = field(default_factory=dict)
    scored: int = 0
    now: float = 100.0

    def generate(self, version: int) -> None:
        """What happens on the way to a batch: sizes depend on the version, so that a mix-up shows."""
        self.tokens += 30 + version
        self.idle_s += 0.125
        self.verdict_s += 0.0625 * version
        self.scored += 4
        self.tickets["charged"] += 2
        self.audit.add(GENERATED, [version, 8])
        if version % 3 == 0:
            self.restarts["rollout worker 0"] = self.restarts.get("rollout worker 0", 0) + 1
            self.reasons["all right"] += 1
            self.tickets["refunded"] += 1
            self.audit.add(REFUSED, [2 * version])
        self.now += 1.5

    def train(self, version: int) -> TakenBatch:
        self.tickets["committed"] += 1
        self.audit.add(TRAINED, [version])
        self.now += 0.5
        return TakenBatch(None, [0, version % 2], version - 1, [2 * version, 2 * version + 1], [version, 0])

    def stats(self) -> FlowStats:
        outstanding = self.tickets["charged"] - self.tickets["committed"] - self.tickets["refunded"]
        tickets = {**self.tickets, "outstanding": outstanding}
        flow = FlowCounters(tickets=tickets, refund_reasons=dict(self.reasons), lengths=self.audit.counts())
        counters = {"scored": self.scored}
        return FlowStats(self.tokens, self.idle_s, 2, flow, counters, self.verdict_s, dict(self.restarts))

    def saved(self) -> str:
        return json.dumps([self.audit.state_dict(), self.tickets, self.reasons, self.tokens])

    @classmethod
    def resumed(cls, saved: str, *, keeps_tokens: bool) -> "Process":
        """The flow goes on where it was; of the stages' own counters only some launchers keep the tokens."""
        audit, tickets, reasons, tokens = json.loads(saved)
        process = cls(tickets=tickets, reasons=reasons, tokens=tokens if keeps_tokens else 0, now=5.0)
        process.audit.load_state_dict(audit)
        return process


def config(steps: int = 50) -> Config:
    config = Config(name="synthetic", steps=steps, launcher=InlineLauncherConfig())
    config.algorithm.value_pretraining_steps = 0
    return config


def recorder(run_dir: Path, process: Process, console: Console | None = None, of: Config | None = None) -> Recorder:
    return Recorder(of or config(), run_dir, console or Console(io.StringIO()), lambda: process.now)


def turn(recorder: Recorder, process: Process, *, generated: bool = False) -> None:
    version = recorder.batches + 1
    if not generated:
        process.generate(version)
    recorder.batch(process.train(version), RESULT, process.stats(), TIMES)


def test_recorder_row_by_hand(tmp_path: Path) -> None:
    process = Process()
    with recorder(tmp_path, process) as recording:
        recording.start_clock()
        for _ in range(3):
            turn(recording, process)
    third = read_flow(tmp_path)[2]
    assert third == {
        "version": 3,
        "step": 3,
        "tickets": [6, 7],
        "group_ids": [3, 0],
        "ages": [0, 1],
        "age_histogram": {"0": 1, "1": 1},
        "committed": 1,
        "refunded": {"all right": 1},
        "outstanding": 2,
        "seconds": {
            "generation_wait_s": 0.125,
            "verdict_wait_s": 0.1875,
            "learning_wait_s": 0.5,
            "learning_s": 1.0,
            "publication_s": 0.25,
        },
        "generated_tokens": 33,
        "restarts": {"rollout worker 0": 1},
        "lengths": {
            "generated": {"responses": 2, "tokens": 11, "histogram": {"4": 1, "8": 1}},
            "trained": {"responses": 1, "tokens": 3, "histogram": {"4": 1}},
            "refused": {"responses": 1, "tokens": 6, "histogram": {"8": 1}},
        },
    }
    row = read_metrics(tmp_path)[2]
    expected = {
        names.AGE_MIN: 0,
        names.AGE_MEAN: 0.5,
        names.AGE_MAX: 1,
        names.STEP_S: 2.0,
        names.TOKENS_PER_S: 33 / 2,
        names.GENERATION_WAIT: 0.125 / (2 * 2.0),  # two workers
        names.LEARNING_WAIT: 0.5 / 2.0,
        names.VERDICT_WAIT_S: 0.1875,
        names.LEARNING_S: 1.0,
        names.LENGTH + GENERATED: 5.5,
        names.LENGTH + TRAINED: 3.0,
        names.LENGTH + REFUSED: 6.0,
        names.LENGTH_BIAS: -2.5,
        names.RESTARTS: 1,
        "tickets_committed": 3,
        "refunds_all_right": 1,
        "verifier_scored": 12,
    }
    assert {name: row[name] for name in expected} == expected
    assert names.LENGTH + DROPPED not in row
    assert names.LENGTH + REFUSED not in read_metrics(tmp_path)[1]


def parts(
    run_dir: Path, process: Process, batches: int, end: Callable[[Recorder], object], saved: Path | None = None
) -> None:
    """One process's part of a run, up to ``batches``; from the checkpoint ``saved``, if any."""
    with recorder(run_dir, process) as recording:
        if saved is not None:
            recording.load(saved, process.stats())
        recording.start_clock()
        half_way = saved is not None and (saved / "half").exists()
        while recording.batches < batches:
            turn(recording, process, generated=half_way)
            half_way = False
        end(recording)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, 5), more=st.integers(0, 3), half=st.booleans(), keeps_tokens=st.booleans())
def test_recorder_resumed_run_equals_the_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, at: int, more: int, half: bool, keeps_tokens: bool
) -> None:
    """Saved after ``at`` batches (``half``: with the next one's work done), killed ``more`` later, resumed."""
    folder = tmp_path_factory.mktemp("runs")
    whole, broken, checkpoint = folder / "whole", folder / "broken", folder / "checkpoint"
    checkpoint.mkdir()
    ends: list[Recorder] = []
    parts(whole, Process(), 8, ends.append)

    first, frozen = Process(), []

    def save_and_go_on(recording: Recorder) -> None:
        if half:
            first.generate(at + 1)
            (checkpoint / "half").touch()
        recording.save(checkpoint, first.stats())
        frozen.append(first.saved())
        for i in range(more):
            turn(recording, first, generated=half and i == 0)

    parts(broken, first, at, save_and_go_on)
    second = Process.resumed(frozen[0], keeps_tokens=keeps_tokens)
    parts(broken, second, 8, ends.append, checkpoint)

    assert read_flow(broken) == read_flow(whole)
    unresumed, resumed = ends
    assert (resumed.totals.ages, resumed.totals.versions) == (unresumed.totals.ages, 8)
    assert resumed.totals.trained_tokens == unresumed.totals.trained_tokens == 8 * 40
    assert resumed.flow == unresumed.flow
    assert read_metrics(broken) == read_metrics(whole)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4))
def test_recorder_rows_add_up_whatever_is_killed(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[int, int]]
) -> None:
    """Each part: batches up to a checkpoint, then batches that a kill undoes."""
    run_dir, saved, process = tmp_path_factory.mktemp("run"), None, Process()
    for part, (kept, lost) in enumerate(plan):
        with recorder(run_dir, process) as recording:
            if saved is not None:
                recording.load(saved, process.stats())
            recording.start_clock()
            for _ in range(kept):
                turn(recording, process)
            saved = tmp_path_factory.mktemp(f"checkpoint{part}")
            recording.save(saved)
            frozen = process.saved()
            for _ in range(lost):
                turn(recording, process)
        flow, rows = recording.flow, read_flow(run_dir)
        if kept + lost:  # else the file still tells of the part before
            assert [row["version"] for row in rows] == list(range(1, recording.batches + 1))
            assert sum(row["committed"] for row in rows) == flow.committed == recording.batches
            assert sum(row["generated_tokens"] for row in rows) == flow.generated_tokens
            assert sum(row["refunded"].get("all right", 0) for row in rows) == flow.refunds["all right"]
            for kind in KINDS:
                audited = [row["lengths"][kind] for row in rows if kind in row["lengths"]]
                assert sum(lengths["tokens"] for lengths in audited) == flow.lengths[kind].tokens
            for name in names.SECONDS:
                assert sum(row["seconds"][name] for row in rows) == pytest.approx(flow.seconds[name])
        process = Process.resumed(frozen, keeps_tokens=part % 2 == 0)


def test_recorder_saved_before_the_first_batch_leaves_the_start_up_out_of_its_rates(tmp_path: Path) -> None:
    checkpoint, process = tmp_path / "checkpoint", Process()
    checkpoint.mkdir()
    with recorder(tmp_path, process) as recording:
        process.now += 60  # models load, the base is evaluated
        recording.save(checkpoint, process.stats())
    process = Process.resumed(process.saved(), keeps_tokens=True)
    with recorder(tmp_path, process) as recording:
        recording.load(checkpoint, process.stats())
        assert recording.saved_at == 0
        process.now += 30
        recording.start_clock()
        turn(recording, process)
    (row,) = read_metrics(tmp_path)
    assert row[names.STEP_S] == 2.0 and row[names.TOKENS_PER_S] == 31 / 2


def test_recorder_summary_and_closing_table_of_a_resumed_run(tmp_path: Path) -> None:
    checkpoint, process, stream = tmp_path / "checkpoint", Process(), io.StringIO()
    checkpoint.mkdir()
    with recorder(tmp_path, process) as recording:
        recording.start_clock()
        recording.evaluation(EvaluationResult(0, [[True], [False]], 4.0))
        for _ in range(3):
            turn(recording, process)
        recording.save(checkpoint, process.stats())
        frozen = process.saved()
        turn(recording, process)
    process = Process.resumed(frozen, keeps_tokens=True)
    with recorder(tmp_path, process, Console(stream)) as recording:
        recording.load(checkpoint, process.stats())
        assert recording.evaluated(0) and recording.saved_at == recording.batches == 3
        recording.start_clock()
        for _ in range(3):
            turn(recording, process)
        process.audit.add(DROPPED, [100])
        summary = recording.finish(process.stats(), checkpoint, interrupted=False)
    assert summary.versions == 6 and summary.wall_s == pytest.approx(6 * 2.0)
    assert summary.generated_tokens == 6 * 30 + (1 + 2 + 3 + 4 + 5 + 6)
    assert summary.age_histogram == {"0": 9, "1": 3} and summary.tickets.balanced
    assert summary.refund_reasons == {"all right": 2} and summary.restarts == {"rollout worker 0": 2}
    assert summary.seconds == {
        "generation_wait_s": pytest.approx(0.75),
        "verdict_wait_s": pytest.approx(0.0625 * 21),
        "learning_wait_s": pytest.approx(3.0),
        "learning_s": pytest.approx(6.0),
        "publication_s": pytest.approx(1.5),
    }
    means = {kind: (counts.responses, counts.mean) for kind, counts in summary.lengths.items()}
    assert means == {GENERATED: (12, (21 + 48) / 12), TRAINED: (6, 3.5), REFUSED: (2, 9.0), DROPPED: (1, 100.0)}
    assert summary.length_bias == pytest.approx(3.5 - 5.75)
    text = stream.getvalue()
    for expected in ("2 refunded (2 all right)", "5.8 generated, 3.5 trained on (-2.2), 9.0 refused, 100.0 dropped"):
        assert expected in text
    assert (tmp_path / "report.png").is_file()


def test_recorder_of_a_replaced_worker_never_counts_backwards(tmp_path: Path) -> None:
    process = Process()
    with recorder(tmp_path, process) as recording:
        recording.start_clock()
        turn(recording, process)
        process.tokens, process.idle_s = 5, 0.0  # a new worker counts from 0
        recording.batch(process.train(2), RESULT, process.stats(), TIMES)
        process.tokens, process.idle_s = 25, 0.25
        recording.batch(process.train(3), RESULT, process.stats(), TIMES)
    assert [row["generated_tokens"] for row in read_flow(tmp_path)] == [31, 0, 20]
    assert [row["seconds"]["generation_wait_s"] for row in read_flow(tmp_path)] == [0.125, 0.0, 0.25]
    assert all(0 <= row[names.GENERATION_WAIT] <= 1 for row in read_metrics(tmp_path))


def test_recorder_bound_lowered_on_resume_is_a_refund_of_the_next_row(tmp_path: Path) -> None:
    """The flow refunds tickets while it loads; the recorder sees it in the counters that it is given afterwards."""
    checkpoint, process = tmp_path / "checkpoint", Process()
    checkpoint.mkdir()
    with recorder(tmp_path, process) as recording:
        recording.start_clock()
        turn(recording, process)
        recording.save(checkpoint, process.stats())
    process = Process.resumed(process.saved(), keeps_tokens=False)
    process.tickets["refunded"] += 1
    process.reasons["max_staleness was lowered"] = 1
    with recorder(tmp_path, process) as recording:
        recording.load(checkpoint, process.stats())
        recording.start_clock()
        turn(recording, process)
    first, second = read_flow(tmp_path)
    assert first["refunded"] == {} and second["refunded"] == {"max_staleness was lowered": 1}


def test_recorder_steps_of_value_pretraining_end_at_0(tmp_path: Path) -> None:
    of, process = config(), Process()
    of.algorithm.value_pretraining_steps = 2
    with recorder(tmp_path, process, of=of) as recording:
        recording.start_clock()
        for changed in (False, False, True):
            process.generate(recording.batches + 1)
            batch = process.train(recording.batches + 1)
            recording.batch(batch, replace(RESULT, policy_changed=changed), process.stats(), TIMES)
    rows = read_flow(tmp_path)
    assert [(row["version"], row["step"]) for row in rows] == [(1, -1), (2, 0), (3, 1)]
    assert all(after["version"] == before["version"] + 1 for before, after in pairwise(rows))
