"""``flow.jsonl``: what became of every ticket, version by version.

One row per batch trained on, everything in it since the row before (so that rows add up), with these names:

| name          | content                                                                                      |
|---------------|----------------------------------------------------------------------------------------------|
| version       | publications so far: this batch made it; the learner took the batch at ``version − 1``       |
| step          | policy updates so far; ≤ 0 while the value is pretrained                                     |
| tickets       | [B] ids of the tickets trained on                                                            |
| group_ids     | [B] their prompts                                                                            |
| ages          | [B] versions                                                                                 |
| age_histogram | age → groups of this batch                                                                   |
| committed     | tickets that ended with a group                                                              |
| refunded      | reason → tickets that ended without one                                                      |
| outstanding   | tickets out now (the one number that is no sum)                                              |
| seconds       | where time went, by the names in :data:`vapo_async.metrics.names.SECONDS`                    |
| generated_tokens, restarts | tokens sampled; dead processes replaced, by stage                               |
| lengths       | kind → ``responses``, ``tokens``, ``histogram`` (upper bound, a power of two → responses)    |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vapo_async.metrics.counters import AgeHistogram
from vapo_async.metrics.flow_sums import FlowSums
from vapo_async.metrics.jsonl import JsonLines, read_json_lines

LEDGER_FILE = "flow.jsonl"


class FlowLedger:
    """Appends rows to the run's ``flow.jsonl``, which a resumed run goes on to write."""

    def __init__(self, run_dir: Path) -> None:
        self._file = JsonLines(run_dir / LEDGER_FILE)

    def write(
        self,
        version: int,
        step: int,
        tickets: Sequence[int],
        group_ids: Sequence[int],
        ages: Sequence[int],
        outstanding: int,
        sums: FlowSums,
    ) -> None:
        """One row; ``sums``: what came since the last one."""
        histogram = AgeHistogram()
        histogram.add(ages)
        row: dict[str, Any] = {
            "version": version,
            "step": step,
            "tickets": list(tickets),
            "group_ids": list(group_ids),
            "ages": list(ages),
            "age_histogram": histogram.state_dict(),
            "committed": sums.committed,
            "refunded": {reason: n for reason, n in sums.refunds.items() if n},
            "outstanding": outstanding,
            "seconds": {name: round(value, 6) for name, value in sums.seconds.items()},
            "generated_tokens": sums.generated_tokens,
            "restarts": {stage: n for stage, n in sums.restarts.items() if n},
            "lengths": {kind: lengths.to_json() for kind, lengths in sums.lengths.items() if lengths.responses},
        }
        self._file.write(row)

    def close(self) -> None:
        self._file.close()


def read_flow(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of ``flow.jsonl`` by version: the history that led to the last one.

    A resumed run writes versions after its checkpoint again: a row replaces the earlier ones of its version and of
    every later version, which were undone by the resume. A last line that was cut by a kill is left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    rows: list[dict[str, Any]] = []
    for row in read_json_lines(run_dir / LEDGER_FILE):
        while rows and rows[-1]["version"] >= row["version"]:
            rows.pop()
        rows.append(row)
    return rows
