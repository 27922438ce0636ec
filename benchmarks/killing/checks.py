"""What must hold at the end."""

import json
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from killing.runs import MAX_STALENESS, run_dir_of
from vapo_async.metrics.ledger import read_flow


def same(reference: Path, killed: Path, versions: int) -> list[tuple[str, bool]]:
    """What the two runs must share."""
    one, other = run_dir_of(reference), run_dir_of(killed)
    assert one is not None and other is not None
    last = f"checkpoints/step_{versions:06d}"
    files = sorted(path.relative_to(one / last) for path in (one / last).rglob("*.safetensors"))
    equal = []
    for name in files:
        a, b = load_file(one / last / name), load_file(other / last / name)
        equal.append(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a))
    (first, second) = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    counts = ("generated_tokens", "trained_tokens", "optimizer_steps", "tickets", "age_histogram", "final_accuracy")
    schedules = [(folder / "schedule.jsonl").read_text() for folder in (one, other)]
    return [
        (f"policy, critic, optimizers and flow are equal bit for bit ({len(files)} files)", all(equal)),
        (f"the same {', '.join(counts)}", all(first[key] == second[key] for key in counts)),
        ("the same schedule", schedules[0] == schedules[1]),
        *ledger_checks(other, versions),
    ]


def ledger_checks(run_dir: Path, versions: int) -> list[tuple[str, bool]]:
    """What holds of every run, by its summary and its ``flow.jsonl``."""
    rows = read_flow(run_dir)
    tickets: dict[str, int] = json.loads((run_dir / "summary.json").read_text())["tickets"]
    trained = Counter(ticket for row in rows for ticket in row["tickets"])
    oldest = max(age for row in rows for age in row["ages"])
    accounted = tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    return [
        (f"{versions} versions, each with 2 groups", [len(row["tickets"]) for row in rows] == [2] * versions),
        (f"every ticket is accounted for ({tickets})", accounted),
        (f"no ticket was trained on twice ({len(trained)} tickets)", max(trained.values()) == 1),
        (f"no group was older than {MAX_STALENESS} versions (oldest {oldest})", oldest <= MAX_STALENESS),
    ]
