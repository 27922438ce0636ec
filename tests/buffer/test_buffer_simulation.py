"""A simulation on the real classes: what a lead below the bound buys under heavy-tailed latencies."""

import heapq
import random

from vapo_async import schema
from vapo_async.buffer import RolloutBuffer
from vapo_async.schema import FinishReason, Problem, Prompt, Response

B = 8


def simulate(bound: int, lead: int, sigma: float, versions: int, seed: int = 0) -> tuple[float, float, int]:
    """Unlimited concurrency, training takes no time: (time units, mean age, largest age)."""
    rng = random.Random(seed)
    buffer = RolloutBuffer(B, 1, bound, lead)
    running: list[tuple[float, int]] = []
    groups = {}
    now, ages = 0.0, []
    while buffer.published < versions:
        while (ticket := buffer.admit()) is not None:
            response = Response(0, [1], [-1.0], [ticket.version], FinishReason.STOP)
            prompt = Prompt(0, Problem(0, "", ""), "", (1,))
            groups[ticket.ticket_id] = schema.stack_group([schema.make_trajectory(prompt, ticket, response)])
            heapq.heappush(running, (now + rng.lognormvariate(0.0, sigma), ticket.ticket_id))
        if (batch := buffer.take()) is not None:
            ages += batch.ages
            buffer.publish()
        else:
            now, ticket_id = heapq.heappop(running)
            buffer.commit(ticket_id, groups.pop(ticket_id))
    return now, sum(ages) / len(ages), max(ages)


def _over_seeds(bound: int, lead: int, versions: int = 60) -> tuple[float, float, int]:
    runs = [simulate(bound, lead, 1.5, versions, seed) for seed in range(2)]
    times, means, largest = zip(*runs, strict=True)
    return sum(times), max(means), max(largest)


def test_the_speed_of_a_large_lag_at_the_age_of_a_small_one() -> None:
    slow, age_0, _ = _over_seeds(0, 0)
    small, age_2, _ = _over_seeds(2, 2)
    large, age_8, oldest_8 = _over_seeds(8, 8)
    ours, age, oldest = _over_seeds(8, 2)
    assert ours <= large / 0.95, f"throughput: {ours:.0f} time units against {large:.0f} at S = L = 8"
    assert small >= 1.5 * ours and slow >= 2.5 * ours, f"S = L = 2: {small:.0f}, synchronous: {slow:.0f}"
    assert age_0 == 0 and age_2 <= 2 and age_8 >= 7 and age <= 2.1, f"mean age {age:.2f} against {age_8:.2f}"
    assert oldest <= 8 and oldest_8 <= 8
