"""How full the learner's passes are and how evenly its ranks are loaded, beside naive ways, on long-tailed lengths.

    python benchmarks/batching.py --json batching.json      seconds on one core
    python benchmarks/batching.py --quick                   fewer seeds: does it run?

A mini-batch is 512 responses, log-normal between 100 and 16,384 tokens, drawn anew for each of 60 seeds. Medians and
what is worst are over seeds.

*Passes* hold at most a budget of tokens. *Packed* rows lie one after another; *padded* ones are of like length and
filled up to the longest; *in order* are as many rows as surely fit, as they come. *Used* is the share of the budget of
all passes that holds tokens, *possible* what it would be with as few passes as the tokens need, *on CPU* and *on GPU*
how often the learner takes that layout there, *slower* what the passes cost above their rows by themselves: padding
and, where there are ranks, waiting, as all wait for the dearest in every pass.
*Above the mean* is what the most loaded rank has, with rows *dealt by cost* as the learner does it or *in turn*, by the
learner's cost of a row in a 32B model and by attention alone.

Demanded of packed passes: that they are taken on a GPU; 95 % of each budget used, by the worst of the seeds where there
are 20 passes or more and by the median where rounding up to whole passes may take a twentieth by itself; of 8 ranks:
none more than 5 % above the mean, and packed passes no more than 5 % slower. Exit code 1 where that is missed.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench import announce, command_line, environment, parse, print_bounds
from bench.lengths import long_tailed

from vapo_async.learner.balance import DecoderCost, shards
from vapo_async.learner.packing import WORTH_PACKING, Layout, choose_layout, cut, pass_count
from vapo_async.planning.shapes import KNOWN

Rows = list[list[int]]
"""Row indices of each pass, or of each rank."""
ROWS, LONGEST = 512, 16_384
BUDGETS, RANKS = (16_384, 32_768, 65_536), (2, 4, 8)
SEEDS, QUICK_SEEDS = 60, 2
LEAST_USED, MOST_ABOVE = 0.95, 0.05
ENOUGH_PASSES = 20
MODEL = KNOWN["Qwen/Qwen2.5-32B"]
COSTS = {
    "32B": DecoderCost.of(
        parameters=MODEL.parameters - MODEL.embedding_parameters,
        layers=MODEL.layers,
        attention_width=MODEL.query_width,
    ),
    "attention": DecoderCost(linear=0.0, quadratic=1.0),
}
IN_ORDER = "in order"
WAYS = (Layout.packed, Layout.padded, IN_ORDER)


@dataclass(frozen=True)
class Spread:
    """Over seeds."""

    median: float
    worst: float


@dataclass(frozen=True)
class PassesRow:
    """A line of the first or the last table."""

    ranks: int
    budget: int
    way: str
    passes: float
    """Of a rank, the median."""
    used: Spread
    possible: float
    """In the seed that used least."""
    chosen: dict[str, float]
    """By the kind of device."""
    slower: Spread


@dataclass(frozen=True)
class RanksRow:
    """A line of the second table."""

    ranks: int
    cost: str
    dealt: Spread
    in_turn: Spread


def in_order(rows: int, size: int) -> Rows:
    """``size`` rows to a pass as they come."""
    return [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]


def in_turn(rows: int, ranks: int) -> Rows:
    """A row to each rank, again and again."""
    return [list(range(rank, rows, ranks)) for rank in range(ranks)]


def passes_of(lengths: Sequence[int], ranks: int, budget: int, way: str) -> list[list[list[int]]]:
    """Lengths of the rows of every pass of every rank: the learner's, or the naive ones."""
    dealt = in_turn(len(lengths), ranks) if way == IN_ORDER else shards(lengths, ranks, COSTS["32B"])
    shares = [[lengths[row] for row in rows] for rows in dealt]
    if way == IN_ORDER:
        made = [in_order(len(share), budget // LONGEST) for share in shares]
    else:
        layout = Layout(way)
        count = pass_count(shares, budget, layout)
        made = [cut(share, budget, layout, count) for share in shares]
    return [[[share[i] for i in rows] for rows in passes] for share, passes in zip(shares, made, strict=True)]


def pass_cost(rows: Sequence[int], way: str) -> float:
    """Of all rows together, each as long as the longest where they are padded."""
    return sum(map(COSTS["32B"], rows if way == Layout.packed else [max(rows)] * len(rows))) if rows else 0.0


def above_mean(loads: Sequence[float]) -> float:
    """The largest by the mean, less 1."""
    return max(loads) * len(loads) / sum(loads) - 1


def slower(passes: Sequence[Sequence[Sequence[int]]], way: str) -> float:
    """Lengths [ranks][passes][rows]: the dearest of each pass together, by the mean rank's rows alone, less 1."""
    taken = sum(max(pass_cost(rows, way) for rows in each) for each in zip(*passes, strict=True))
    alone = sum(COSTS["32B"](length) for rank in passes for rows in rank for length in rows)
    return taken * len(passes) / alone - 1


def spread(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> Spread:
    """``worst``: min or max."""
    return Spread(statistics.median(values), worst(values))


def passes_row(batches: Sequence[list[int]], ranks: int, budget: int, way: str) -> PassesRow:
    """One way to make passes, on all batches."""
    made = [passes_of(lengths, ranks, budget, way) for lengths in batches]
    shares = [[[lengths[row] for row in rows] for rows in shards(lengths, ranks, COSTS["32B"])] for lengths in batches]
    counts = [len(passes[0]) for passes in made]
    tokens = [sum(lengths) for lengths in batches]
    fewest = [math.ceil(t / (budget * ranks)) for t in tokens]
    used = [t / (budget * ranks * count) for t, count in zip(tokens, counts, strict=True)]
    worst = used.index(min(used))
    return PassesRow(
        ranks=ranks,
        budget=budget,
        way=way,
        passes=statistics.median(counts),
        used=spread(used, min),
        possible=tokens[worst] / (budget * ranks * fewest[worst]),
        chosen={
            device: statistics.mean(choose_layout(dealt, budget, worth) == way for dealt in shares)
            for device, worth in WORTH_PACKING.items()
        },
        slower=spread([slower(passes, way) for passes in made], max),
    )


def ranks_row(batches: Sequence[list[int]], ranks: int, name: str) -> RanksRow:
    """Both ways to deal rows out, on all batches."""
    cost = COSTS[name]

    def found(deal: Callable[[list[int]], Rows]) -> Spread:
        loads = [[sum(cost(lengths[row]) for row in rows) for rows in deal(lengths)] for lengths in batches]
        return spread([above_mean(each) for each in loads], max)

    dealt, naive = found(lambda x: shards(x, ranks, cost)), found(lambda x: in_turn(len(x), ranks))
    return RanksRow(ranks, name, dealt, naive)


def bounds(
    alone: Sequence[PassesRow], dealt: Sequence[RanksRow], together: Sequence[PassesRow]
) -> list[tuple[str, bool]]:
    """What is demanded, and whether it holds."""
    found = []
    for row in alone:
        if row.way == Layout.packed:
            which, used = ("worst", row.used.worst) if row.passes >= ENOUGH_PASSES else ("median", row.used.median)
            text = f"packed, {row.budget:,} tokens: {used:.1%} used, the {which} of the seeds"
            found.append((f"{text} (demanded >= {LEAST_USED:.0%})", used >= LEAST_USED))
    for row in (*alone, *together):
        if row.way == Layout.packed:
            often = row.chosen["cuda"]
            text = f"ranks: {row.ranks}, {row.budget:,} tokens: packed on a GPU by {often:.0%} of seeds (demanded 100%)"
            found.append((text, often == 1.0))
    demanded = f"(demanded <= {MOST_ABOVE:.0%})"
    for each in dealt:
        if each.ranks == max(RANKS):
            text = f"{each.ranks} ranks, {each.cost}: the most loaded {each.dealt.worst:.3%} above the mean at worst"
            found.append((f"{text} {demanded}", each.dealt.worst <= MOST_ABOVE))
    for row in together:
        if row.way == Layout.packed:
            text = f"{row.ranks} ranks, packed, {row.budget:,} tokens: {row.slower.worst:.1%} slower at worst"
            found.append((f"{text} {demanded}", row.slower.worst <= MOST_ABOVE))
    return found


def print_passes(rows: Sequence[PassesRow]) -> None:
    """As text."""
    title = f"passes of {rows[0].ranks} ranks" if rows[0].ranks > 1 else "passes of one rank"
    print(f"\n{title:<20}{'each':>7}{'used':>16}{'':>18}{'slower':>16}")
    used = f"{'median':>9}{'worst':>7}{'possible':>10}"
    print(f"{'budget, way':<20}{'rank':>7}{used}{'on CPU':>8}{'on GPU':>8}{'median':>9}{'worst':>7}")
    for row in rows:
        used = f"{row.used.median:>9.1%}{row.used.worst:>7.1%}{row.possible:>10.1%}"
        chosen = "".join(f"{share:>8.0%}" for share in row.chosen.values())
        slow = f"{row.slower.median:>9.1%}{row.slower.worst:>7.1%}"
        print(f"{f'{row.budget:,} {row.way}':<20}{row.passes:>7,.0f}{used}{chosen}{slow}")


def print_ranks(rows: Sequence[RanksRow]) -> None:
    """As text."""
    print(f"\n{'above the mean':<20}{'dealt by cost':>20}{'in turn':>18}\n{'ranks, cost':<20}", end="")
    print(f"{'median':>11}{'worst':>9}{'median':>10}{'worst':>8}")
    for row in rows:
        texts = f"{row.dealt.median:>11.4%}{row.dealt.worst:>9.4%}{row.in_turn.median:>10.1%}{row.in_turn.worst:>8.1%}"
        print(f"{f'{row.ranks} {row.cost}':<20}{texts}")


def main(arguments: list[str]) -> int:
    """Runs it, prints the tables and whether each bound holds, writes rows. 1 if one does not hold."""
    options = parse(command_line(__doc__), arguments)
    before = environment()
    announce(before)
    batches = [long_tailed(ROWS, seed) for seed in range(QUICK_SEEDS if options.quick else SEEDS)]
    alone = [passes_row(batches, 1, budget, way) for budget in BUDGETS for way in WAYS]
    dealt = [ranks_row(batches, ranks, name) for name in COSTS for ranks in RANKS]
    together = [passes_row(batches, max(RANKS), budget, way) for budget in BUDGETS for way in WAYS]
    print_passes(alone)
    print_ranks(dealt)
    print_passes(together)
    found = bounds(alone, dealt, together)
    print()
    print_bounds(found)
    if options.json is not None:
        written = {
            "environment": before,
            "batches": {"rows": ROWS, "seeds": len(batches), "tokens": statistics.median(map(sum, batches))},
            "passes": [asdict(row) for row in alone],
            "ranks": [asdict(each) for each in dealt],
            "passes_of_ranks": [asdict(row) for row in together],
            "bounds": [{"bound": text, "holds": holds} for text, holds in found],
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0 if all(holds for _, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
