"""The collected cases, judged as the main job judges them: in sealed worker processes."""

import time

from test_verifier_math import _rows, needs_data

from vapo_async.verifier import Sandbox
from vapo_async.verifier.jobs import EquivalenceJob


@needs_data
def test_core_cases_and_all_gsm8k_model_solutions_at_500_a_second() -> None:
    rows = _rows("gsm8k_model_solutions.jsonl")
    core = [row for row in _rows("cases.jsonl") if row["tag"] == "core"]
    rates = []
    with Sandbox(workers=2, timeout_s=2.0, memory_mb=2048) as sandbox:
        for cases in (core, rows, rows):
            start = time.perf_counter()
            outcomes = sandbox.run([EquivalenceJob(row["gold"], row["pred"]) for row in cases])
            rates.append(len(cases) / (time.perf_counter() - start))
            wrong = [row for row, o in zip(cases, outcomes, strict=True) if o.correct != row["expected"]]
            assert not wrong, wrong[:3]
    print(f"{len(core)} core cases, {len(rows):,} GSM8K solutions: {max(rates[1:]):,.0f} answers/s")
    assert len(core) == 95 and len(rows) == 5276 and max(rates[1:]) >= 500
