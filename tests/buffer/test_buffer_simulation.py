"""The real buffer under modelled engines: makespans worked out by hand, Little's law, failures, the bound."""

import sys
from dataclasses import replace

import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(REPOSITORY / "benchmarks"))

from vapo_async.simulation.cluster import (
    BatchSizes,
    Cluster,
    Learner,
    Lengths,
    Publication,
    Rollout,
    Stragglers,
)
from vapo_async.simulation.run import STRAGGLER, WORKER_LOST, EventKind, Simulation, simulate

TEN = Lengths(median_tokens=10)
"""Every response has 10 tokens: 10 seconds at one token a second."""


def cluster(
    groups: int = 2, *, size: int = 1, workers: int = 1, slots: int | None = 2, learn_s: float = 0.0
) -> Cluster:
    return Cluster("", BatchSizes(groups, size), TEN, Rollout(workers, 1.0, slots), learner=Learner(learn_s))


@pytest.mark.parametrize(("learn_s", "wall_s"), [(0.0, 50.0), (7.0, 85.0), (15.0, 125.0)])
def test_a_synchronous_run_takes_the_sum(learn_s: float, wall_s: float) -> None:
    outcome = simulate(cluster(learn_s=learn_s), 0, 0, versions=5)
    assert outcome.wall_s == pytest.approx(wall_s)
    assert outcome.mean_age == 0 and outcome.ages == {0: 10}
    assert outcome.learner_idle == pytest.approx(50 / wall_s)
    assert outcome.slots_free == pytest.approx(1 - 50 / wall_s)


@pytest.mark.parametrize(("learn_s", "wall_s"), [(0.0, 50.0), (7.0, 57.0), (15.0, 85.0)])
def test_an_overlapped_run_takes_the_longer_stage(learn_s: float, wall_s: float) -> None:
    """The first batch is generated alone, the last one learned alone; in between the longer stage rules."""
    assert simulate(cluster(learn_s=learn_s), 1, 1, versions=5).wall_s == pytest.approx(wall_s)


def test_two_workers_take_half_as_long() -> None:
    """Batches of 4 on 2 slots: two rounds for one worker, one for two."""
    assert simulate(cluster(4), 0, 0, versions=3).wall_s == pytest.approx(60.0)
    outcome = simulate(cluster(4, workers=2), 0, 0, versions=3)
    assert outcome.wall_s == pytest.approx(30.0) and outcome.slots_free == pytest.approx(0.0)
    assert outcome.groups_per_s == pytest.approx(0.4) and outcome.tokens_per_s == pytest.approx(4.0)


def test_a_group_ends_with_its_longest_response() -> None:
    lengths = Lengths(histogram={5: 1.0, 10: 1.0})
    simulation = Simulation(replace(cluster(1, size=3, slots=3), lengths=lengths), 0, 0, seed=1)
    drawn: list[int] = []
    draw = simulation._draw
    simulation._draw = lambda: drawn.append(draw()) or drawn[-1]  # type: ignore[func-returns-value]
    outcome = simulation.run(20)
    assert outcome.wall_s == pytest.approx(sum(max(drawn[i : i + 3]) for i in range(0, 60, 3)))
    assert len(set(drawn)) > 5


def test_a_full_engine_is_slower_for_each_response() -> None:
    """Steps of 1 s alone and of 3 / 1.5 = 2 s with all three slots taken, 1.5 s with two."""
    slower = replace(cluster(3, slots=3), rollout=Rollout(1, 1.0, 3, tokens_per_s_full=1.5))
    assert simulate(slower, 0, 0, versions=4).wall_s == pytest.approx(80.0)
    assert simulate(replace(slower, batch=BatchSizes(2)), 0, 0, versions=4).wall_s == pytest.approx(60.0)
    assert simulate(replace(slower, batch=BatchSizes(1)), 0, 0, versions=4).wall_s == pytest.approx(40.0)


def test_prefill_stands_before_decoding_once_for_a_group() -> None:
    """4 prompt tokens at 2 a second: 2 s for a group of three, 4 s for two groups."""
    lengths, rollout = replace(TEN, prompt_tokens=4), Rollout(1, 1.0, 6, prefill_tokens_per_s=2.0)
    one = Cluster("", BatchSizes(1, 3), lengths, rollout)
    assert simulate(one, 0, 0, versions=3).wall_s == pytest.approx(36.0)
    outcome = simulate(replace(one, batch=BatchSizes(2, 3)), 0, 0, versions=3)
    assert outcome.wall_s == pytest.approx(42.0) and outcome.workers_stalled == pytest.approx(4 / 14)


def test_a_publication_stalls_what_is_in_flight() -> None:
    """B = 1 on one slot, L = 1: a stall of 3 s hits every response but the first, whose 10 s are free of it."""
    stalled = replace(cluster(1, slots=1), publication=Publication(stall_s=3.0))
    assert simulate(stalled, 1, 1, versions=5).wall_s == pytest.approx(10 + 4 * 13)


def test_recomputed_keys_cost_what_is_in_flight() -> None:
    """Two slots, B = 1: each publication finds one response at 5 of its 10 tokens; 6 tokens a second make 5 / 6 s.

    The second response waits in the other slot from the start, so both run in step: it has all 10 tokens by then.
    """
    rollout = Rollout(1, 1.0, 2, prefill_tokens_per_s=6.0)
    recomputing = Cluster("", BatchSizes(1), TEN, rollout, Publication(recompute_kv=True), Learner(5.0))
    # Both end at 10; batch 1 is learned until 15, when the next response begins: 0 tokens in flight. Batch 2 until 20,
    # where that response has 5 tokens: its end moves from 25 to 25 + 5 / 6. Batch 3 until 30 + 5 / 6.
    assert simulate(recomputing, 1, 1, versions=3).wall_s == pytest.approx(30 + 5 / 6)


def test_a_broadcast_grows_with_the_doublings() -> None:
    def transfer_s(workers: int) -> float:
        publication = Publication(transfer_s=2.0, transfer_doubling_s=0.5)
        return replace(cluster(workers=workers), publication=publication).transfer_s

    assert [transfer_s(n) for n in (1, 2, 3, 4, 4096)] == [2.0, 2.5, 3.0, 3.0, 8.0]
    paid = replace(cluster(), publication=Publication(transfer_s=2.0))
    assert simulate(paid, 0, 0, versions=5).wall_s == pytest.approx(60.0)


def test_a_lost_worker_costs_its_work_and_the_restart() -> None:
    """Lost after 4 s, back 6 s later: the same prompts again from the start, 20 s for 10."""
    simulation = Simulation(replace(cluster(2), rollout=Rollout(1, 1.0, 2, restart_s=6.0)), 0, 0)
    simulation._later(4.0, EventKind.LOST)
    outcome = simulation.run(1)
    assert outcome.wall_s == pytest.approx(20.0)
    assert outcome.refunds == {WORKER_LOST: 2}
    assert simulation._prompts == 4, "two for the first batch, two for the next: none was drawn again"
    assert outcome.tokens_wasted == pytest.approx(8 / 28)
    assert outcome.workers_empty == pytest.approx(6 / 20)


def test_failures_are_refunded_and_every_batch_is_trained_on() -> None:
    """A worker fails about every fourth group; tickets still balance, and no prompt is lost or doubled."""
    flaky = replace(cluster(4, workers=3), rollout=Rollout(3, 1.0, 2, mtbf_s=40.0, restart_s=5.0))
    simulation = Simulation(flaky, 2, 1, seed=3)
    outcome = simulation.run(40)
    counts = simulation.buffer.ticket_counts()
    assert outcome.refunds[WORKER_LOST] == counts["refunded"] >= 20
    assert counts["charged"] == counts["committed"] + counts["refunded"] + counts["outstanding"]
    started = simulation._prompts - len(simulation._returned)
    assert started == counts["committed"] + counts["outstanding"]
    assert outcome.max_age <= 2 and 0 < outcome.tokens_wasted < 0.5


def test_a_straggler_is_dropped_as_often_as_it_may_be() -> None:
    """One response of 1,000 s among those of 10 s; B = 1, so the learner waits for it with S = L = 0."""

    def wall(stragglers: Stragglers) -> tuple[float, dict[str, int]]:
        simulation = Simulation(replace(cluster(1, slots=1), stragglers=stragglers), 0, 0)
        lengths = iter([1000, *[10] * 50])
        simulation._draw = lambda: next(lengths)
        outcome = simulation.run(3)
        return outcome.wall_s, outcome.refunds

    assert wall(Stragglers()) == (pytest.approx(1020.0), {})
    # Its prompt comes first again: dropped twice after 50 s, then waited for.
    assert wall(Stragglers(50.0, max_drops=2)) == (pytest.approx(1120.0), {STRAGGLER: 2})
    assert wall(Stragglers(2000.0)) == (pytest.approx(1020.0), {})


def test_littles_law() -> None:
    """Groups in generation on average = groups per second times their time there, each counted its own way."""
    lengths = Lengths(median_tokens=10, sigma=1.0)
    simulation = Simulation(replace(cluster(4, workers=2, slots=3, learn_s=4.0), lengths=lengths), 4, 2)
    area, last = 0.0, [0.0]
    feed, handle = simulation._feed, simulation._handle

    def watched(*arguments: int) -> None:
        nonlocal area
        area += (simulation.now - last[0]) * simulation.buffer.outstanding
        last[0] = simulation.now
        handle(*arguments)  # type: ignore[arg-type]

    simulation._handle, simulation._feed = watched, feed  # type: ignore[method-assign]
    simulation.run(400)
    latencies = simulation.latencies_s
    mean, rate = sum(latencies) / len(latencies), len(latencies) / simulation.now
    assert area / simulation.now == pytest.approx(rate * mean, rel=0.01)


@given(
    bound=st.integers(0, 4),
    lead=st.integers(0, 4),
    sigma=st.sampled_from([0.0, 0.7, 1.5]),
    workers=st.integers(1, 4),
    slots=st.sampled_from([None, 1, 3]),
    size=st.integers(1, 3),
    mtbf=st.sampled_from([None, 200.0]),
    timeout=st.sampled_from([None, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_run_ends_keeps_the_bound_and_repeats(
    bound: int, lead: int, sigma: float, workers: int, slots: int | None, size: int, mtbf: float | None,
    timeout: float | None, seed: int,
) -> None:  # fmt: skip
    made = Cluster(
        "",
        BatchSizes(3, size),
        Lengths(median_tokens=10, sigma=sigma, max_tokens=300, prompt_tokens=2),
        Rollout(workers, 1.0, slots, prefill_tokens_per_s=20.0, mtbf_s=mtbf, restart_s=5.0),
        Publication(transfer_s=1.0, stall_s=0.5, recompute_kv=True),
        Learner(fixed_s=3.0, tokens_per_s=30.0),
        Stragglers(timeout),
    )
    lead = min(lead, bound)
    first, again = (simulate(made, bound, lead, versions=8, seed=seed) for _ in range(2))
    assert first.max_age <= bound and sum(first.ages.values()) == 24
    assert replace(first, buffer_us=0.0) == replace(again, buffer_us=0.0)
    assert 0 <= first.learner_idle <= 1 and 0 <= first.workers_empty <= 1 and 0 <= first.tokens_wasted <= 1
    assert slots is None or -1e-9 <= (first.slots_free or 0.0) <= 1


def test_seeds_differ() -> None:
    made = replace(cluster(4), lengths=Lengths(median_tokens=10, sigma=1.0))
    assert len({simulate(made, 2, 1, versions=5, seed=seed).wall_s for seed in range(5)}) == 5


def test_the_speed_of_a_large_lag_at_the_age_of_a_small_one() -> None:
    heavy = Cluster("", BatchSizes(8), Lengths(median_tokens=1000, sigma=1.5), Rollout(1, 1000.0))

    def run(bound: int, lead: int) -> tuple[float, float]:
        outcomes = [simulate(heavy, bound, lead, versions=60, seed=seed) for seed in range(3)]
        return sum(outcome.wall_s for outcome in outcomes), max(outcome.mean_age for outcome in outcomes)

    (slow, age_0), (small, age_2), (large, age_8), (ours, age) = run(0, 0), run(2, 2), run(8, 8), run(8, 2)
    assert ours <= large / 0.95, f"{ours:.0f} time units against {large:.0f} at S = L = 8"
    assert small >= 1.4 * ours and slow >= 2.2 * ours, f"S = L = 2: {small:.0f}, synchronous: {slow:.0f}"
    assert age_0 == 0 and age_2 <= 2 and age_8 >= 7 and age <= 2.1, f"mean age {age:.2f} against {age_8:.2f}"
