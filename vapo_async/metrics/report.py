"""``report.png``: the run at a glance, drawn from ``metrics.jsonl``."""

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vapo_async.metrics import names
from vapo_async.metrics.loggers import read_metrics
from vapo_async.metrics.summary import SUMMARY_FILE, read_summary

REPORT_FILE = "report.png"
Rows = list[dict[str, float]]

MAIN, SECOND, THIRD, QUIET, BAND = "#1f5fa8", "#d9722b", "#b3261e", "#8a8f98", "#f1f2f4"

# The length-bias audit: scalar → how it is drawn
LENGTHS: dict[str, dict[str, Any]] = {
    names.RESPONSE_LENGTH: {"color": MAIN, "linewidth": 2, "label": "trained on"},
    names.LENGTH + "generated": {"color": QUIET, "linewidth": 1.2, "linestyle": "--", "label": "generated"},
    names.LENGTH + "refused": {"color": SECOND, "linewidth": 1.2, "label": "refused"},
    names.LENGTH + "dropped": {"color": THIRD, "linewidth": 0, "marker": "x", "label": "dropped"},  # rare
}


def write_report(run_dir: Path, max_staleness: int | None = None) -> Path:
    """Draws ``report.png`` into the run's folder and returns its path; no display is needed.

    Args:
        run_dir: holds ``metrics.jsonl`` and, once the run has ended, ``summary.json``.
        max_staleness: S, drawn as the ages' bound; None takes it from ``summary.json`` where there is one.
    """
    rows = read_metrics(run_dir)
    title = run_dir.name
    if (run_dir / SUMMARY_FILE).is_file():
        summary = read_summary(run_dir)
        max_staleness = summary.max_staleness if max_staleness is None else max_staleness
        title = f"{summary.name or run_dir.name} · seed {summary.seed} · {summary.wall_s / 60:.1f} min"
    figure = draw(rows, title, max_staleness)
    path = run_dir / REPORT_FILE
    temporary = run_dir / f".{REPORT_FILE}"
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)
    return path


def draw(rows: Rows, title: str, max_staleness: int | None) -> Figure:
    """Eight panels against policy steps; the shaded part left of 0 is value pretraining."""
    figure = Figure(figsize=(19, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    panels = figure.subplots(2, 4, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    _accuracy(panels[0, 0], rows)
    _line(panels[0, 1], rows, names.REWARD, "Reward", "mean over the batch's responses")
    _line(panels[0, 2], rows, names.ENTROPY, "Entropy", "nats per token")
    _line(panels[0, 3], rows, names.EXPLAINED_VARIANCE, "Explained variance of the critic", "1 − Var(R − V) / Var(R)")
    panels[0, 3].axhline(0, color=QUIET, linewidth=0.8)
    low = panels[0, 3].get_ylim()[0]
    panels[0, 3].set_ylim(bottom=max(low, -1.0))  # an untrained critic may start far below 0
    _lengths(panels[1, 0], rows)
    _ages(panels[1, 1], rows, max_staleness)
    _waits(panels[1, 2], rows)
    _refunds(panels[1, 3], rows)
    first, last = (rows[0]["step"], rows[-1]["step"]) if rows else (0, 1)
    for axes in panels.flat:
        _finish(axes, first, last)
    return figure


def _accuracy(axes: Axes, rows: Rows) -> None:
    axes.set_title("Accuracy")
    train, heldout = _points(rows, names.TRAIN_ACCURACY), _points(rows, names.HELDOUT_ACCURACY)
    if train:
        axes.plot(*zip(*train, strict=True), color=QUIET, linewidth=1, alpha=0.8, label="training batch")
    if heldout:
        steps, values = zip(*heldout, strict=True)
        spread = {row["step"]: row.get(names.HELDOUT_STDERR, math.nan) for row in rows}
        bars = [1.96 * spread[step] if math.isfinite(spread[step]) else 0.0 for step in steps]
        axes.errorbar(steps, values, bars, color=MAIN, marker="o", linewidth=2, capsize=3, label="held-out (95 %)")
        axes.axhline(values[0], color=SECOND, linestyle="--", linewidth=1.2, label=f"base {values[0]:.1%}")
        axes.annotate(
            f"{values[-1]:.1%}",
            (steps[-1], values[-1]),
            xytext=(2, -18 if values[-1] > 0.3 else 10),  # where the other curves seldom are
            textcoords="offset points",
            ha="right",
            color=MAIN,
            fontweight="bold",
        )
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if train or heldout:
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    else:
        _nothing(axes)


def _ages(axes: Axes, rows: Rows, max_staleness: int | None) -> None:
    axes.set_title("Age of the groups trained on")
    axes.set_ylabel("versions", color=QUIET)
    mean, oldest = _points(rows, names.AGE_MEAN), _points(rows, names.AGE_MAX)
    if not mean and not oldest:
        _nothing(axes)
        return
    if oldest:
        axes.step(*zip(*oldest, strict=True), where="mid", color=SECOND, linewidth=1.2, label="max")
    if mean:
        axes.plot(*zip(*mean, strict=True), color=MAIN, linewidth=2, label="mean")
    if max_staleness is not None:
        axes.axhline(max_staleness, color=THIRD, linestyle="--", linewidth=1.2, label=f"bound {max_staleness}")
    top = max([value for _, value in mean + oldest] + [max_staleness or 0, 1])
    axes.set_ylim(-0.05 * top, 1.3 * top)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", frameon=False, fontsize=9, ncols=3)


def _lengths(axes: Axes, rows: Rows) -> None:
    axes.set_title("Response length")
    axes.set_ylabel("tokens, mean since the last batch", color=QUIET)
    found = {name: _points(rows, name) for name in LENGTHS}
    for name, points in found.items():
        if points:
            axes.plot(*zip(*points, strict=True), **LENGTHS[name])
    _legend_above(axes, any(found.values()))


def _refunds(axes: Axes, rows: Rows) -> None:
    axes.set_title("Tickets refunded")
    axes.set_ylabel("so far, by reason", color=QUIET)
    logged = sorted({name for row in rows for name in row if name.startswith(names.REFUNDS)})
    found = {name: _points(rows, name) for name in logged}
    curves = {name: points for name, points in found.items() if any(n for _, n in points)}
    for name, points in curves.items():
        axes.step(*zip(*points, strict=True), where="post", label=name.removeprefix(names.REFUNDS).replace("_", " "))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if curves or not logged:
        _legend_above(axes, bool(curves))
    else:
        _nothing(axes, "none")


def _waits(axes: Axes, rows: Rows) -> None:
    axes.set_title("Time without work")
    axes.set_ylabel("share of the step's time", color=QUIET)
    generation, learning = _points(rows, names.GENERATION_WAIT), _points(rows, names.LEARNING_WAIT)
    if generation:
        axes.plot(*zip(*generation, strict=True), color=SECOND, linewidth=1.5, label="generation")
    if learning:
        axes.plot(*zip(*learning, strict=True), color=MAIN, linewidth=1.5, label="learner")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.0)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    _legend_above(axes, bool(generation or learning))


def _legend_above(axes: Axes, anything: bool) -> None:
    """A legend in room of its own above the curves, or a word that there are none."""
    if not anything:
        _nothing(axes)
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))
    axes.legend(loc="upper left", frameon=False, fontsize=9, ncols=2)


def _line(axes: Axes, rows: Rows, name: str, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(label, color=QUIET)
    points = _points(rows, name)
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=MAIN, linewidth=1.8, marker="o" if len(points) < 3 else None)
    else:
        _nothing(axes)


def _finish(axes: Axes, first: float, last: float) -> None:
    if first < 0:
        axes.axvspan(first, 0, color=BAND, zorder=0)
    margin = 0.02 * max(last - first, 1)
    axes.set_xlim(first - (0 if first < 0 else margin), last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("policy step" + (" (shaded: value pretraining)" if first < 0 else ""), color=QUIET)
    axes.title.set_fontsize(11)
    axes.title.set_fontweight("bold")
    axes.grid(color="#dfe1e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#555555", labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#c4c7cc")


def _points(rows: Rows, name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def _nothing(axes: Axes, text: str = "nothing logged") -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
