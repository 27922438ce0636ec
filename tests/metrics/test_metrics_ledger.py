"""The ledger: rows add up, survive a kill, and tell the one history that led to the last of them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vapo_async.metrics.flow_sums import FlowSums, Lengths
from vapo_async.metrics.ledger import LEDGER_FILE, FlowLedger, read_flow


def write(run_dir: Path, *versions: int, mark: int = 0) -> None:
    ledger = FlowLedger(run_dir)
    for version in versions:
        ledger.write(version, version - 2, [version, mark], [7, 8], [0, 1], 3, FlowSums(committed=2))
    ledger.close()


def test_metrics_ledger_row_by_hand(tmp_path: Path) -> None:
    sums = FlowSums(
        generated_tokens=50,
        seconds={"learning_wait_s": 0.1234567891},
        restarts={"verifier": 0, "rollout worker": 1},
        verifier={"scored": 4},
        committed=3,
        refunds={"all right": 0, "straggler": 1},
        lengths={"generated": Lengths(2, 9, {4: 1, 8: 1}), "refused": Lengths()},
    )
    ledger = FlowLedger(tmp_path)
    ledger.write(5, 3, [11, 9, 12], [4, 2, 6], [1, 2, 1], 6, sums)
    assert read_flow(tmp_path) == [  # flushed: no close needed
        {
            "version": 5,
            "step": 3,
            "tickets": [11, 9, 12],
            "group_ids": [4, 2, 6],
            "ages": [1, 2, 1],
            "age_histogram": {"1": 2, "2": 1},
            "committed": 3,
            "refunded": {"straggler": 1},
            "outstanding": 6,
            "seconds": {"learning_wait_s": 0.123457},
            "generated_tokens": 50,
            "restarts": {"rollout worker": 1},
            "lengths": {"generated": {"responses": 2, "tokens": 9, "histogram": {"4": 1, "8": 1}}},
        }
    ]
    ledger.close()


def test_metrics_ledger_resume_undoes_later_versions(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3, 4, mark=0)
    write(tmp_path, 3, mark=1)  # resumed from version 2 and stopped before version 4
    assert [row["tickets"] for row in read_flow(tmp_path)] == [[1, 0], [2, 0], [3, 1]]
    write(tmp_path, 4, 5, mark=2)
    assert [row["tickets"] for row in read_flow(tmp_path)] == [[1, 0], [2, 0], [3, 1], [4, 2], [5, 2]]


def test_metrics_ledger_cut_at_any_byte_loses_one_row_at_most(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / LEDGER_FILE
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        kept = 1 + (size == len(whole) - 1)  # the row is whole, only its end of line is missing
        assert [row["version"] for row in read_flow(tmp_path)] == [1, 2][:kept]
        write(tmp_path, 2, 3, mark=9)
        assert [row["tickets"] for row in read_flow(tmp_path)] == [[1, 0], [2, 9], [3, 9]]


def test_metrics_ledger_of_another_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no flow\.jsonl in .*: is it a run's folder"):
        read_flow(tmp_path)


lengths = st.builds(
    Lengths, st.integers(0, 99), st.integers(0, 999), st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.integers(1))
)
counts = st.dictionaries(st.sampled_from("abc"), st.integers(0, 99))
sums = st.builds(
    FlowSums,
    generated_tokens=st.integers(0, 999),
    seconds=st.dictionaries(st.sampled_from("xyz"), st.floats(0, 1e6)),
    restarts=counts,
    verifier=counts,
    committed=st.integers(0, 99),
    refunds=counts,
    lengths=st.dictionaries(st.sampled_from(["generated", "trained"]), lengths),
)


@settings(deadline=None)
@given(sums)
def test_metrics_flow_sums_survive_json_and_copies_are_their_own(before: FlowSums) -> None:
    assert FlowSums.from_json(json.loads(json.dumps(before.to_json()))) == before
    copy = before.copy()
    assert copy == before
    copy.refunds["a new one"] = 1
    assert copy != before


@settings(deadline=None)
@given(sums)
def test_metrics_flow_sums_since_nothing_is_all_and_since_themselves_is_nothing(now: FlowSums) -> None:
    assert now.since(FlowSums()) == now
    nothing = now.since(now)
    assert (nothing.generated_tokens, nothing.committed) == (0, 0)
    assert not any([*nothing.seconds.values(), *nothing.refunds.values(), *nothing.restarts.values()])
    assert all(kind == Lengths() for kind in nothing.lengths.values())


def test_metrics_flow_sums_refuse_a_state_that_does_not_fit() -> None:
    state = FlowSums().to_json()
    del state["refunds"]
    with pytest.raises(ValueError, match="do not fit: refunds"):
        FlowSums.from_json(state)
