"""The flow's actor as an ordinary object in one event loop: who waits for whom, and what ends each wait."""

import asyncio
from pathlib import Path

from conftest import tiny_overrides

from vapo_async.build import BaseModel
from vapo_async.config.load import load_config
from vapo_async.launcher.ray_flow import FlowActor
from vapo_async.schema import FinishReason, Response
from vapo_async.state import read_state


def flow_actor(base_folder: Path, tmp_path: Path, *more: str) -> FlowActor:
    config = load_config([*tiny_overrides(base_folder, tmp_path), "launcher=ray", *more])
    return FlowActor(config, BaseModel(base_folder, base_folder))


DROP = ("buffer.max_staleness=0", "buffer.on_straggler=drop", "buffer.straggler_timeout_s=0.05", "buffer.max_drops=1")


def test_a_straggler_is_cancelled_at_its_owner_and_its_prompt_goes_to_who_asks(
    base_folder: Path, tmp_path: Path
) -> None:
    async def scenario() -> None:
        actor = flow_actor(base_folder, tmp_path, *DROP)
        first, second = await actor.admit(4, "a")
        asks = asyncio.create_task(actor.cancellations("a"))
        waits = asyncio.create_task(actor.admit(4, "b"))
        take = asyncio.create_task(actor.take())
        assert await asyncio.wait_for(asks, 5) == [first.ticket.ticket_id]
        (again,) = await asyncio.wait_for(waits, 5)
        assert again.prompt.group_id == first.prompt.group_id
        assert again.ticket.ticket_id not in (first.ticket.ticket_id, second.ticket.ticket_id)
        assert await asyncio.wait_for(actor.cancellations("a"), 5) == [second.ticket.ticket_id]
        counters, _ = await actor.counters()
        assert counters.drops == 2
        assert not take.done()
        await actor.close()
        assert await asyncio.wait_for(take, 5) is None

    asyncio.run(scenario())


def test_a_lost_owner_gets_nothing_more_and_its_prompts_go_to_the_others(base_folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        actor = flow_actor(base_folder, tmp_path, "buffer.max_staleness=0")
        held = await actor.admit(4, "a")
        assert len(held) == 2
        waits = asyncio.create_task(actor.admit(4, "a"))
        asks = asyncio.create_task(actor.cancellations("a"))
        other = asyncio.create_task(actor.admit(4, "b"))
        assert await actor.lose("a") == [assignment.ticket.ticket_id for assignment in held]
        assert await asyncio.wait_for(waits, 5) == []
        assert await asyncio.wait_for(asks, 5) is None
        taken_over = await asyncio.wait_for(other, 5)
        assert {a.prompt.group_id for a in taken_over} == {a.prompt.group_id for a in held}
        counters, _ = await actor.counters()
        assert counters.refund_reasons == {"worker lost": 2}

    asyncio.run(scenario())


def test_a_closed_flow_lets_everybody_go(base_folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        actor = flow_actor(base_folder, tmp_path, "buffer.max_staleness=0")
        await actor.admit(4, "a")
        waiting = asyncio.gather(actor.admit(1, "a"), actor.cancellations("a"), actor.take())
        await asyncio.sleep(0)
        await actor.close()
        assert await asyncio.wait_for(waiting, 5) == [[], None, None]

    asyncio.run(scenario())


def test_a_loaded_flow_hands_out_running_tickets_with_what_was_carried(base_folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        actor = flow_actor(base_folder, tmp_path, "buffer.max_staleness=0")
        first, second = await actor.admit(4, "a")
        cut = [Response(i, [5 + i, 6], [-0.5, -0.25], [0, 0], FinishReason.ABORTED) for i in range(4)]
        await actor.save(tmp_path, {second.ticket.ticket_id: cut, 99: cut})
        again = flow_actor(base_folder, tmp_path, "buffer.max_staleness=0")
        assert await again.load(tmp_path) == 0
        got = await again.admit(4, "rollout worker 0")
        assert [a.ticket for a in got] == [first.ticket, second.ticket]
        assert [list(a.carried) for a in got] == [[], cut]
        assert [a.prompt for a in got] == [first.prompt, second.prompt]

    asyncio.run(scenario())
    assert (tmp_path / "flow.safetensors").exists()
    assert read_state(tmp_path, "flow").data
