"""The report and the summary, from fabricated runs."""

import json
import math
from pathlib import Path

import pytest

from vapo_async.config import LoggingConfig
from vapo_async.metrics import names
from vapo_async.metrics.loggers import build_logger, read_metrics
from vapo_async.metrics.report import draw, write_report
from vapo_async.metrics.summary import LengthCounts, Summary, TicketCounts, read_summary, write_summary

PNG = b"\x89PNG\r\n\x1a\n"


def make_summary() -> Summary:
    return Summary(
        base_accuracy=0.18,
        final_accuracy=0.8,
        best_accuracy=0.82,
        wall_s=540.0,
        generated_tokens=10,
        trained_tokens=9,
        versions=3,
        optimizer_steps=12,
        max_staleness=4,
        max_age=3,
        mean_age=1.5,
        age_histogram={"0": 2, "3": 2},
        seed=1,
        tickets=TicketCounts(charged=6, committed=4, refunded=1, outstanding=1),
        name="fabricated",
        refund_reasons={"straggler": 1},
        lengths={"trained": LengthCounts(16, 40.5), "dropped": LengthCounts(0, None)},
        length_bias=-0.5,
        seconds={"learning_wait_s": 3.25},
        restarts={"verifier": 1},
    )


def fabricate(run_dir: Path, pretraining: int, steps: int) -> None:
    with build_logger(LoggingConfig(), run_dir, "run", pretraining) as log:
        log.log(0, {names.HELDOUT_ACCURACY: 0.18, names.HELDOUT_STDERR: 0.01})
        for step in range(1 - pretraining, steps + 1):
            shared = {names.REWARD: step / 10, names.RESPONSE_LENGTH: 40.0, names.TRAIN_ACCURACY: 0.3}
            variance = math.nan if step == 1 - pretraining else 0.2
            log.log(step, {**shared, names.ENTROPY: 0.5, names.EXPLAINED_VARIANCE: variance, names.AGE_MEAN: 1.0})
            if step > 0:
                log.log(step, {names.AGE_MAX: 2.0, names.HELDOUT_ACCURACY: 0.5, names.HELDOUT_STDERR: 0.02})


@pytest.mark.parametrize(("pretraining", "steps"), [(4, 6), (0, 6), (4, 0), (0, 1)])
def test_metrics_report_is_a_picture(pretraining: int, steps: int, tmp_path: Path) -> None:
    fabricate(tmp_path, pretraining, steps)
    write_summary(make_summary(), tmp_path)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.png" and path.read_bytes().startswith(PNG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["csv", "metrics.jsonl", "report.png", "summary.json"]


def test_metrics_report_shows_its_panels_with_base_and_bound(tmp_path: Path) -> None:
    fabricate(tmp_path, 4, 6)
    figure = draw(read_metrics(tmp_path), "a title", max_staleness=4)
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert len(panels) == 8
    labels = {text.get_text() for axes in figure.axes if (legend := axes.get_legend()) for text in legend.get_texts()}
    assert {"base 18.0%", "bound 4", "mean", "max"} <= labels
    reward = panels["Reward"].lines[0]
    assert list(reward.get_xdata()) == list(range(-3, 7))
    assert list(reward.get_ydata()) == [step / 10 for step in range(-3, 7)]


def test_metrics_report_draws_the_flow(tmp_path: Path) -> None:
    with build_logger(LoggingConfig(), tmp_path, "run") as log:
        for step in (1, 2, 3):
            shares = {names.GENERATION_WAIT: 0.1 * step, names.LEARNING_WAIT: 0.5}
            lengths = {names.LENGTH + "generated": 20.0 + step, names.RESPONSE_LENGTH: 20.0}
            refunds = {names.REFUNDS + "worker_lost": step - 1, names.REFUNDS + "all_right": 0}
            log.log(step, shares | lengths | refunds)
        log.log(2, {names.LENGTH + "dropped": 64.0})
    panels = {axes.get_title(): axes for axes in draw(read_metrics(tmp_path), "a title", None).axes}
    drawn = {
        title: {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for title, axes in panels.items()
    }
    assert drawn["Response length"] == {
        "generated": ([1, 2, 3], [21.0, 22.0, 23.0]),
        "trained on": ([1, 2, 3], [20.0, 20.0, 20.0]),
        "dropped": ([2], [64.0]),
    }
    assert drawn["Time without work"] == {
        "generation": ([1, 2, 3], pytest.approx([0.1, 0.2, 0.3])),
        "learner": ([1, 2, 3], [0.5, 0.5, 0.5]),
    }
    assert drawn["Tickets refunded"] == {"worker lost": ([1, 2, 3], [0, 1, 2])}


def test_metrics_report_tells_no_refund_from_none_logged(tmp_path: Path) -> None:
    fabricate(tmp_path, 0, 3)

    def texts() -> dict[str, list[str]]:
        axes = draw(read_metrics(tmp_path), "a title", None).axes
        return {a.get_title(): [text.get_text() for text in a.texts] for a in axes}

    assert texts()["Tickets refunded"] == texts()["Time without work"] == ["nothing logged"]
    with build_logger(LoggingConfig(), tmp_path, "run") as log:
        log.log(3, {names.REFUNDS + "all_right": 0})
    assert texts()["Tickets refunded"] == ["none"]


def test_metrics_report_of_a_run_that_died_early(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert write_report(tmp_path).read_bytes().startswith(PNG)


def test_metrics_report_of_a_folder_without_metrics_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is it a run's folder"):
        write_report(tmp_path)


def test_metrics_summary_holds_the_promised_names_and_reads_back(tmp_path: Path) -> None:
    write_summary(make_summary(), tmp_path)
    data = json.loads((tmp_path / "summary.json").read_text())
    promised = (
        "base_accuracy final_accuracy best_accuracy wall_s generated_tokens trained_tokens versions optimizer_steps "
        "max_staleness max_age mean_age age_histogram seed tickets"
    )
    assert data.keys() >= set(promised.split())
    assert data["tickets"] == {"charged": 6, "committed": 4, "refunded": 1, "outstanding": 1}
    assert read_summary(tmp_path) == make_summary()
    assert make_summary().tickets.balanced and not TicketCounts(charged=1).balanced


def test_metrics_summary_of_an_older_run_is_read(tmp_path: Path) -> None:
    write_summary(make_summary(), tmp_path)
    path = tmp_path / "summary.json"
    data = json.loads(path.read_text())
    for name in ("refund_reasons", "lengths", "length_bias", "seconds", "restarts"):
        del data[name]
    path.write_text(json.dumps(data))
    summary = read_summary(tmp_path)
    assert summary.tickets.balanced and summary.lengths == {} and summary.length_bias is None


def test_metrics_summary_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_summary(make_summary(), tmp_path)

    def full_disk(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_summary(make_summary(), tmp_path)
    assert read_summary(tmp_path) == make_summary()


def test_metrics_summary_stays_valid_json_when_a_number_is_not(tmp_path: Path) -> None:
    summary = make_summary()
    summary.final_accuracy, summary.extra = math.nan, {"curve": [1.0, math.inf]}
    write_summary(summary, tmp_path)
    data = json.loads((tmp_path / "summary.json").read_text())
    assert data["final_accuracy"] is None and data["extra"] == {"curve": [1.0, None]}
