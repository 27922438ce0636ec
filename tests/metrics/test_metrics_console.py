"""The live line says what it should, on a terminal and away from one."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from vapo_async.metrics.console import ETA_WINDOW, Console, Eta, Phase, StepRow, format_duration, format_row

ROW = StepRow(
    phase=Phase.policy,
    step=12,
    total=30,
    remaining=18,
    reward=0.417,
    response_length=41.2,
    age_mean=1.94,
    age_max=3,
    tokens_per_s=2310.4,
    generation_wait=0.04,
    learning_wait=0.31,
    heldout=0.712,
    heldout_base=0.183,
)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def ticking(step_s: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step_s


def test_metrics_line_of_a_policy_step() -> None:
    assert format_row(ROW, 190) == (
        "policy 12/30 · eta 3:10 · held-out 71.2% (base 18.3%) · reward +0.42 · length 41 · age 1.9 (max 3) · "
        "2,310 tok/s · waiting: generation 4%, learning 31%"
    )


def test_metrics_line_of_value_pretraining_tells_explained_variance() -> None:
    row = dataclasses.replace(ROW, phase=Phase.value_pretraining, heldout=None, explained_variance=0.314)
    line = format_row(row, None)
    assert line.startswith("value pretraining 12/30 · eta – · reward") and "explained variance 0.31" in line
    assert "held-out" not in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (190, "3:10"), (3723, "1:02:03"), (-1, "0:00")]
)
def test_metrics_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_metrics_eta_counts_remaining_batches() -> None:
    clock = ticking(6.0)
    eta = Eta(lambda: next(clock))
    assert eta.update(10) is None
    assert eta.update(9) == pytest.approx(54.0)
    assert eta.update(0) == 0.0


def test_metrics_eta_forgets_the_slow_start() -> None:
    times = iter([0.0, 500.0, *(500.0 + i for i in range(1, ETA_WINDOW + 1))])
    eta = Eta(lambda: next(times))
    estimates = [eta.update(10) for _ in range(ETA_WINDOW + 2)]
    assert estimates[1] == pytest.approx(5000.0) and estimates[-1] == pytest.approx(10.0)


def test_metrics_console_away_from_a_terminal_prints_one_line_per_step() -> None:
    stream, clock = io.StringIO(), ticking(10.0)
    with Console(stream, lambda: next(clock)) as console:
        console.note("base 18.3% [256 problems]")
        console.step(ROW)
        console.step(dataclasses.replace(ROW, step=13, remaining=17))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "base 18.3% [256 problems]" and len(lines) == 3
    assert lines[2].startswith("policy 13/30 · eta 2:50 · held-out 71.2% (base 18.3%)")
    assert "\x1b" not in stream.getvalue()


def test_metrics_console_on_a_terminal_updates_one_line_and_gives_the_cursor_back() -> None:
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Console(stream) as console:
        console.step(ROW)
        console.note("a note [with brackets]")
        console.step(dataclasses.replace(ROW, step=13))
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert "13/30" in text and "a note [with brackets]" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_metrics_closing_table_says_where_everything_is() -> None:
    stream = io.StringIO()
    summary = {
        "base_accuracy": 0.183,
        "final_accuracy": 0.82,
        "best_accuracy": 0.83,
        "wall_s": 543.2,
        "generated_tokens": 1_000_000,
        "trained_tokens": 900_000,
        "versions": 31,
        "optimizer_steps": 120,
        "max_staleness": 4,
        "max_age": 3,
        "mean_age": 1.9,
        "seed": 0,
        "tickets": {"charged": 10, "committed": 8, "refunded": 1, "outstanding": 1},
    }
    long = Path("a" * 90) / "report.png"
    Console(stream).closing_table(summary, {"report": long})
    text = stream.getvalue()
    for expected in ("18.3% → 82.0% (+63.7 points, best 83.0%)", "9:03", "mean 1.90, max 3 of at most 4", str(long)):
        assert expected in text
    assert "10 charged, 8 committed, 1 refunded, 1 outstanding" in text


def test_metrics_closing_table_tells_refunds_lengths_and_replacements_where_there_are_any() -> None:
    stream = io.StringIO()
    summary = {
        "tickets": {"charged": 1204, "committed": 1200, "refunded": 3, "outstanding": 1},
        "refund_reasons": {"all right": 0, "straggler": 2, "worker lost": 1},
        "lengths": {
            "generated": {"responses": 40, "mean": 12.25},
            "trained": {"responses": 32, "mean": 10.0},
            "refused": {"responses": 0, "mean": None},
            "dropped": {"responses": 8, "mean": 1021.3},
        },
        "length_bias": -2.25,
        "restarts": {"rollout worker 0": 2, "verifier": 1},
    }
    Console(stream).closing_table(summary, {})
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines() if line.strip()]
    assert lines == [
        "tickets 1,204 charged, 1,200 committed, 3 refunded (2 straggler, 1 worker lost), 1 outstanding",
        "mean response length 12.2 generated, 10.0 trained on (-2.2), 1,021.3 dropped",
        "processes replaced 2 × rollout worker 0, 1 × verifier",
    ]


def test_metrics_closing_table_of_an_interrupted_run_leaves_out_what_is_unknown() -> None:
    stream = io.StringIO()
    Console(stream).closing_table({"seed": 3, "base_accuracy": None, "final_accuracy": None}, {"run": Path("runs/x")})
    assert "seed" in stream.getvalue() and "runs/x" in stream.getvalue() and "held-out" not in stream.getvalue()
