"""Dynamic sampling with real stages: batches hold mixed groups only, and lost patience is one line."""

import asyncio
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides
from guessing_policy import guessing_overrides
from running import command, newest_run, nursery, start
from safetensors.torch import load_file

from vapo_async import schema
from vapo_async.build import BaseModel, build_verifier
from vapo_async.config import Config
from vapo_async.config.load import load_config
from vapo_async.launcher.inline import InlineStages
from vapo_async.launcher.ray_flow import FlowActor, Progress
from vapo_async.launcher.run import launch
from vapo_async.metrics.console import Console
from vapo_async.metrics.loggers import read_metrics
from vapo_async.schema import CORRECT, FinishReason, Problem, Response, Score
from vapo_async.verifier import ScoreRequest

ON = ("algorithm.dynamic_sampling=true",)


def guessing(folder: Path, tmp_path: Path, *more: str) -> Config:
    return load_config([*guessing_overrides(folder, tmp_path), *ON, *more])


@pytest.mark.parametrize(("bound", "pretraining"), [(0, 0), (0, 1), (2, 0), (2, 2)])
def test_policy_batches_hold_mixed_groups_only(
    guessing_folder: Path, tmp_path: Path, bound: int, pretraining: int
) -> None:
    settings = (f"buffer.max_staleness={bound}", f"algorithm.value_pretraining_steps={pretraining}")
    config = guessing(guessing_folder, tmp_path, *settings)
    stages = InlineStages(config, BaseModel(guessing_folder, guessing_folder))
    mixed: list[bool] = []
    try:
        for _ in range(pretraining + 6):
            batch = stages.take(lambda: False)
            assert batch is not None and max(batch.ages) <= bound
            verdicts = [bool(t[CORRECT]) for t in batch.handle.groups.unbind(0)]
            mixed += [0 < sum(verdicts[i : i + 4]) < 4 for i in range(0, len(verdicts), 4)]
            stages.publish(stages.learn(batch).policy_changed)
        stats = stages.stats()
    finally:
        stages.shutdown()
    judged = config.algorithm.groups_per_batch * pretraining
    assert all(mixed[judged:]) and len(mixed[judged:]) == 12
    assert pretraining == 0 or not all(mixed[:judged]), "as they come: about half of the groups are mixed"
    tickets, reasons = stats.flow.tickets, stats.flow.refund_reasons
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    assert tickets["refunded"] == sum(reasons.values()) >= 3
    assert stats.flow.lengths["refused"].responses == 4 * tickets["refunded"]
    assert 0 < stats.flow.lengths["refused"].tokens < stats.generated_tokens


def test_the_run_is_a_function_of_its_seed_and_counts_its_refunds(guessing_folder: Path, tmp_path: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        config = guessing(guessing_folder, tmp_path, "buffer.max_staleness=2", "steps=4")
        summary, run_dir = launch(config, Console())
        assert summary.status == "finished" and summary.tickets.balanced
        assert summary.generated_tokens > summary.trained_tokens
        rows = [row for row in read_metrics(run_dir) if "reward" in row]
        refused = [row["refunds_all_right"] + row["refunds_all_wrong"] for row in rows]
        assert refused == sorted(refused) and refused[-1] == rows[-1]["tickets_refunded"] > 0
        assert all(1 <= row["length_refused"] <= 12 for row in rows if "length_refused" in row)
        assert any("length_refused" in row for row in rows)
        assert all(0 < row["correct"] < 1 for row in rows[1:])
        return load_file(sorted((run_dir / "checkpoints").iterdir())[-1] / "policy" / "model.safetensors")

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_refused_group_wakes_who_waits_for_a_ticket(base_folder: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(base_folder, tmp_path)
    config = load_config([*overrides, *ON, "algorithm.value_pretraining_steps=0", "buffer.max_staleness=0"])

    async def scenario() -> None:
        actor = FlowActor(config, BaseModel(base_folder, base_folder))
        first, _ = await actor.admit(9, "worker")
        waiting = asyncio.create_task(actor.admit(9, "worker"))
        await asyncio.sleep(0)
        assert not waiting.done(), "the lead is spent"
        trajectories = []
        for i in range(4):
            response = Response(i, [3, 1], [-1.0, -1.0], [0, 0], FinishReason.STOP)
            trajectories.append(schema.make_trajectory(first.prompt, first.ticket, response))
            schema.set_score(trajectories[-1], Score(False, -1.0))
        await actor.commit(first.ticket.ticket_id, schema.stack_group(trajectories), "worker", Progress())
        (fresh,) = await asyncio.wait_for(waiting, 10)
        assert fresh.prompt.group_id == 2
        assert (await actor.counters())[0].refund_reasons == {"all right": 0, "all wrong": 1}

    asyncio.run(scenario())


def run_until_patience_is_lost(base_folder: Path, tmp_path: Path, launcher: str) -> Path:
    """The random policy never solves a chain: value pretraining ends, and then no group is mixed."""
    log = tmp_path / "log"
    more = (f"launcher={launcher}", "buffer.max_staleness=2", "algorithm.dynamic_sampling_patience=3")
    process = start(command(base_folder, tmp_path, *ON, *more), log)
    assert process.wait(timeout=200) == 1, log.read_text()
    last = log.read_text().strip().splitlines()[-1]
    assert re.match(r"error: dynamic sampling refused \d+ groups in a row, 0 all right and \d+ all wrong: ", last), last
    assert "Traceback" not in log.read_text()
    run_dir = newest_run(tmp_path)
    assert f"resume=auto goes on from {run_dir}/checkpoints/step_000001" in log.read_text()
    return run_dir


@pytest.mark.slow
@pytest.mark.ray
def test_lost_patience_ends_a_run_over_ray_with_one_line(base_folder: Path, tmp_path: Path) -> None:
    run_dir = run_until_patience_is_lost(base_folder, tmp_path, "ray")
    flow = json.loads((run_dir / "checkpoints" / "step_000001" / "flow.json").read_text())
    reasons = flow["buffer"]["refund_reasons"]
    assert reasons["all wrong"] >= 6, "more than the 4 that may be out at a time: refunds gave new tickets"


def test_lost_patience_is_one_line_and_the_run_goes_on_without(base_folder: Path, tmp_path: Path) -> None:
    run_dir = run_until_patience_is_lost(base_folder, tmp_path, "inline")
    log = tmp_path / "again"
    resume = (f"resume={run_dir}", "algorithm.dynamic_sampling=false", "steps=2")
    process = nursery().start(resume, log)
    assert process.wait(timeout=150) == 0, log.read_text()
    tickets = json.loads((run_dir / "summary.json").read_text())["tickets"]
    assert tickets["charged"] == tickets["committed"] + tickets["refunded"] + tickets["outstanding"]
    assert tickets["refunded"] >= 6


def test_the_overlong_ramp_is_the_configured_share_of_the_limit(tiny_config: Config) -> None:
    """L_max = 12, L_cache = 12 / 3 = 4: free up to 8 tokens, then −1/4 for each, −1 at the limit and beyond."""
    tiny_config.algorithm.overlong_cache = 1 / 3
    verifier = build_verifier(tiny_config)
    try:
        requests = [ScoreRequest(Problem(0, "1+1:", "2"), "no answer", n) for n in (1, 7, 8, 9, 10, 11, 12, 13)]
        rewards = [score.reward for score in verifier.score(requests)]
    finally:
        verifier.close()
    assert rewards == [-1.0, -1.0, -1.0, -1.25, -1.5, -1.75, -2.0, -2.0]
