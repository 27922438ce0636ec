"""The (S, L) plane of one cluster as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vapo_async.simulation.cluster import Cluster
from vapo_async.simulation.sweep import GOOD_ENOUGH, Pair, pareto, recommend

MAIN, SECOND, QUIET = "#1f5fa8", "#d9722b", "#8a8f98"


def draw(cluster: Cluster, pairs: Sequence[Pair], path: Path) -> None:
    """Throughput and mean age as heat maps, and the Pareto line; the recommended pair is marked in all three."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(cluster.name, fontsize=13, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots(1, 3, gridspec_kw={"wspace": 0.06, "width_ratios": (1, 1, 1.1)})
    best, taken = max(pair.groups_per_s for pair in pairs), recommend(pairs)
    _heat(axes[0], pairs, [100 * pair.groups_per_s / best for pair in pairs], "{:.0f}", "Blues", taken)
    axes[0].set_title("Throughput, % of the best", loc="left", fontsize=11)
    _heat(axes[1], pairs, [pair.mean_age for pair in pairs], "{:.1f}", "Oranges", taken)
    axes[1].set_title("Mean age of the groups trained on, versions", loc="left", fontsize=11)
    _line(axes[2], pairs, best, taken)
    figure.savefig(path, format="png", dpi=110)


def _heat(axes: Axes, pairs: Sequence[Pair], values: Sequence[float], form: str, colours: str, taken: Pair) -> None:
    bounds = sorted({pair.max_staleness for pair in pairs})
    leads = sorted({pair.lead for pair in pairs})
    grid = [[math.nan] * len(bounds) for _ in leads]
    for pair, value in zip(pairs, values, strict=True):
        grid[leads.index(pair.lead)][bounds.index(pair.max_staleness)] = value
    low, high = min(values), max(values)
    axes.imshow(grid, origin="lower", cmap=colours, vmin=low, vmax=high + 0.15 * (high - low), aspect="auto")
    for pair, value in zip(pairs, values, strict=True):
        place = bounds.index(pair.max_staleness), leads.index(pair.lead)
        dark = value > low + 0.6 * (high - low)
        axes.text(*place, form.format(value), ha="center", va="center", fontsize=10, color="white" if dark else "black")
    x, y = bounds.index(taken.max_staleness), leads.index(taken.lead)
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2.5))
    axes.set_xticks(range(len(bounds)), [str(bound) for bound in bounds])
    axes.set_yticks(range(len(leads)), [str(lead) for lead in leads])
    axes.set_xlabel("bound S (buffer.max_staleness)")
    axes.set_ylabel("lead L (buffer.lead)")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _line(axes: Axes, pairs: Sequence[Pair], best: float, taken: Pair) -> None:
    """Throughput against mean age; where several pairs lie together, one of them has a name."""
    line, oldest = pareto(pairs), max(pair.mean_age for pair in pairs)
    at = {id(pair): (pair.mean_age, 100 * pair.groups_per_s / best) for pair in pairs}
    axes.axhline(100 * GOOD_ENOUGH, color=QUIET, linewidth=1, linestyle="--")
    axes.text(0.01, 100 * GOOD_ENOUGH + 0.6, f"{GOOD_ENOUGH:.0%} of the best", transform=axes.get_yaxis_transform(),
              va="bottom", fontsize=9, color=QUIET)  # fmt: skip
    others = [pair for pair in pairs if pair not in line]
    axes.plot(*zip(*at.values(), strict=True), color=QUIET, marker="o", markersize=5, linestyle="none")
    axes.plot(*zip(*(at[id(pair)] for pair in line), strict=True), color=MAIN, marker="o", linewidth=2, markersize=6)
    axes.plot(*at[id(taken)], marker="o", markersize=13, fillstyle="none", markeredgewidth=2.2, color=SECOND)
    named: list[tuple[float, float]] = []
    for pair in [taken, *reversed(line), *others]:
        age, speed = at[id(pair)]
        if any(abs(age - x) < 0.12 * oldest and abs(speed - y) < 4 for x, y in named):
            continue
        named.append((age, speed))
        colour = SECOND if pair is taken else "black" if pair in line else QUIET
        place, side = ((-12, 6), "right") if pair is taken else ((9, -4), "left")
        name = f"S {pair.max_staleness}, L {pair.lead}"
        axes.annotate(name, (age, speed), xytext=place, ha=side, textcoords="offset points", fontsize=9, color=colour)
    axes.set_title("Throughput, % of the best, by mean age", loc="left", fontsize=11)
    axes.set_xlabel("mean age, versions")
    axes.set_ylim(bottom=max(0.0, min(speed for _, speed in at.values()) - 8), top=106)
    axes.set_xlim(-0.05 * oldest - 0.05, 1.18 * oldest + 0.1)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
