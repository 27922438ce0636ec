"""The benchmark of the buffer measures what it says, on small sizes."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from vapo_async.buffer import RolloutBuffer
from vapo_async.schema import TICKET_ID, Ticket, check_trajectories

script = runpy.run_path(str(REPOSITORY / "benchmarks" / "buffer.py"))


def test_groups_are_real_and_used_again_under_another_ticket() -> None:
    groups, buffer = script["Groups"](), RolloutBuffer(16, 16, 1, 0)
    tickets = [buffer.admit() for _ in range(16)]
    for ticket in tickets:
        assert ticket is not None
        buffer.commit(ticket.ticket_id, groups.make(ticket))
    batch = buffer.take()
    assert batch is not None
    groups.taken(batch)
    again = groups.make(Ticket(99, 1))
    columns = check_trajectories(again.unbind(0))
    assert {int(ticket) for ticket in columns[TICKET_ID]} == {99}
    assert [len(mask) for mask in columns["response_mask"]] == [512] * 16
    assert all(torch.equal(versions, torch.ones(512, dtype=torch.int32)) for versions in columns["policy_version"])


def test_held_groups_are_held() -> None:
    buffer, groups, clock = RolloutBuffer(16, 16, 3, 2), script["Groups"](), script["Clock"]()
    script["fill"](buffer, groups, clock)
    assert (buffer.ready, clock.groups) == (48, 48) and clock.us > 0
    script["turn"](buffer, groups, clock, script["Clock"]())
    assert buffer.ready == 32 and buffer.published == 1


def test_bounds() -> None:
    row = script["Row"]
    rows = [
        row("passed", 100, 400.0, 100.0, 2000.0, 1.0),
        row("passed", 1000, 900.0, 100.0, 1000.0, 2.0),
        row("held", 100, 1000.0, 200.0, 833.0, 1.0),
        row("held", 1000, 1000.0, 200.0, 850.0, 0.9),
    ]
    assert [holds for _, holds in script["bounds"](rows)] == [True, False, False, True]
    assert script["bounds"](rows)[1][0].startswith("passed: 2.00 times the cost of a group from 100 to 1,000 groups")


def test_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script["main"](["--quick", "--json", str(tmp_path / "buffer.json")]) == 0
    written = json.loads((tmp_path / "buffer.json").read_text())
    assert [(row["kind"], row["groups"]) for row in written["buffer"]] == [
        ("passed", 32),
        ("passed", 64),
        ("held", 32),
        ("held", 64),
    ]
    assert all(row["commit_us"] > 0 and row["take_us"] > 0 for row in written["buffer"])
    assert written["operations_per_s"].keys() == {"admit", "refund", "commit", "take", "publish", "state round trip"}
    assert "held 64" in capsys.readouterr().out
