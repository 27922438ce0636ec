"""Plans from configurations: the shipped experiments on 64 and 128 GPUs, what does not fit, and by how much."""

import re
from dataclasses import replace
from typing import Any

import pytest

from vapo_async.config import Config, ConfigError, FolderModelConfig
from vapo_async.config.load import load_config
from vapo_async.planning.cluster import GIB, read_cluster
from vapo_async.planning.fit import best_layout, fits, misfits
from vapo_async.planning.layout import layout_of
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.plan import Plan, make_plan
from vapo_async.planning.report import duration, layout_note, notes, plan_data, plan_text
from vapo_async.planning.simulated import simulated_cluster
from vapo_async.simulation.cluster import parse_cluster

LENGTHS = ResponseLengths(4096, 0.8, 20_480, 200)
SHORT = ResponseLengths(42, 0.5, 128, 20)


def paper(*overrides: str, cluster: str = "h100_64") -> tuple[Config, Plan]:
    config = load_config(["experiment=paper_qwen2.5_32b", *overrides])
    return config, make_plan(config, read_cluster(cluster), LENGTHS)


def told(*overrides: str, cluster: str = "h100_64") -> list[str]:
    return [misfit.text for misfit in misfits(*paper(*overrides, cluster=cluster))]


@pytest.mark.parametrize("experiment", ["paper_qwen2.5_32b", "dapo_qwen2.5_32b"])
def test_the_shipped_experiments_fit_64_gpus_and_share_them_out_well(experiment: str) -> None:
    config = load_config([f"experiment={experiment}"])
    plan = make_plan(config, read_cluster("h100_64"), LENGTHS)
    assert misfits(config, plan) == [] and plan.layout.devices == 64
    best = best_layout(config, plan, LENGTHS)
    assert best is not None and best.overlapped_s >= 0.98 * plan.overlapped_s
    assert layout_note(plan, best, fits=True) == []
    assert [note for note in notes(config, plan) if "dynamic_sampling" not in note] == []


def test_128_gpus_are_shared_out_anew() -> None:
    config, plan = paper(cluster="h100_128")
    assert misfits(config, plan) == [] and plan.layout.devices == 64
    assert "idle 64" in plan_text(config, plan)
    best = best_layout(config, plan, LENGTHS)
    assert best is not None and 120 < best.layout.devices <= 128
    assert best.overlapped_s < 0.6 * plan.overlapped_s
    settings = [f"learner.ranks={best.layout.ranks}", f"launcher.rollout_workers={best.layout.workers}"]
    assert layout_note(plan, best, fits=True) == [f"{' '.join(settings)} shares the GPUs out better: a step in "
                                                  f"{duration(best.overlapped_s)}"]  # fmt: skip
    config, taken = paper(*settings, cluster="h100_128")
    assert taken.overlapped_s == pytest.approx(best.overlapped_s) and misfits(config, taken) == []


def test_what_is_over_is_told_and_taking_it_away_fits() -> None:
    """The number is exact: a GPU larger by it holds the learner, one smaller than that does not."""
    config, plan = paper("learner.activation_checkpointing=false")
    (misfit,) = misfits(config, plan)
    assert misfit.component == "learner" and misfit.over_gib > 100
    assert misfit.text.endswith("; learner.activation_checkpointing=true fits")
    assert f"{misfit.over_gib:.1f} GiB too much" in misfit.text
    cluster = read_cluster("h100_64")
    assert cluster.device.memory_gib is not None
    for more, holds in ((0.01, True), (-0.01, False)):
        device = replace(cluster.device, memory_gib=cluster.device.memory_gib + misfit.over_gib + more)
        larger = make_plan(config, replace(cluster, device=device), LENGTHS)
        assert (misfits(config, larger) == []) == fits(config, larger) == holds


def test_an_engine_fits_a_gpu_that_is_larger_by_what_was_over() -> None:
    """Whether its weights leave a little or are larger than the GPU."""
    config, _ = paper("engine.tensor_parallel_size=1", "launcher.rollout_workers=23")
    cluster = read_cluster("h100_64")
    for memory_gib in (79.1, 40.0):
        small = replace(cluster, device=replace(cluster.device, memory_gib=memory_gib))
        found = {m.component: m.over_gib for m in misfits(config, make_plan(config, small, LENGTHS))}
        for more, holds in ((0.01, True), (-0.01, False)):
            larger = memory_gib + (found["engine"] + more) / config.engine.gpu_memory_utilization  # type: ignore[attr-defined]
            device = replace(cluster.device, memory_gib=larger)
            again = misfits(config, make_plan(config, replace(cluster, device=device), LENGTHS))
            assert ("engine" not in {misfit.component for misfit in again}) == holds


def test_notes_tell_of_limits_that_would_end_the_run() -> None:
    config, plan = paper("launcher.stage_timeout_s=2000", "launcher.engine_timeout_s=3", "engine.max_slots=256")
    found = notes(config, plan)
    assert any(note.startswith("launcher.stage_timeout_s is 2000 s, and a step takes 4,") for note in found)
    waits = f"a weight update takes {plan.publication.stall_s + plan.recompute_s + plan.decoding.step_s:.0f} s"
    assert any(note.startswith(f"launcher.engine_timeout_s is 3 s, and {waits}") for note in found)
    assert any("engine.max_slots is 256" in note for note in found)
    assert len(found) == 3


def test_what_engines_compute_again_after_an_update_is_counted() -> None:
    """Tokens behind the responses in flight over the speed of a prefill: 2 FLOPs for each parameter and token, at half
    of four GPUs' peak."""
    config, plan = paper()
    behind = plan.decoding.slots * LENGTHS.mean_context
    by_hand = behind * 2 * plan.shape.parameters / (4 * 989e12 * 0.5)
    assert plan.recompute_s == pytest.approx(by_hand) and 20 < by_hand < 30
    text = " ".join(plan_text(config, plan).split())
    assert f"engines stand still for 2.11 s, then for {by_hand:.3g} s while keys and values are computed again" in text
    config, kept = paper("engine.kv_cache_on_update=keep")
    assert kept.recompute_s == 0 and "computed again" not in " ".join(plan_text(config, kept).split()).split("step")[0]
    assert "engines stand still for 2.11 s step" in " ".join(plan_text(config, kept).split())
    slow = replace(plan, generation_s=1e6)
    assert slow.overlapped_s == pytest.approx(1e6 + 2.11 + by_hand, rel=1e-7)


def test_one_of_a_thing_is_not_several() -> None:
    config, plan = paper("engine.max_slots=2")
    few = replace(plan, decoding=replace(plan.decoding, slots=1), learning=replace(plan.learning, microbatches=1))
    text = " ".join(plan_text(config, few).split())
    assert "; 1 response of mean length in flight" in text and "arithmetic, 1 micro-batch a mini-batch" in text
    assert any(note.startswith("the KV cache holds 1 response of mean length, ") for note in notes(config, few))
    assert "4 micro-batches a mini-batch" in " ".join(plan_text(config, plan).split())


def test_weights_are_gathered_over_the_learner_alone() -> None:
    """A learner inside a node gathers over NVLink, wherever the engines are; a single rank has nothing to gather."""
    config = load_config(["experiment=paper_qwen2.5_32b", "model.path=Qwen/Qwen2.5-7B", "learner.ranks=8"])
    plan = make_plan(config, read_cluster("h100_64"), LENGTHS)
    weights, sent = 2 * plan.shape.parameters, 2 * plan.shape.parameters / (50e9 * 0.7)
    assert plan.publication.transfer_s == pytest.approx(weights / (450e9 * 0.7) + sent)
    alone = make_plan(config, read_cluster("h100_64"), LENGTHS, replace(layout_of(config), ranks=1))
    assert alone.publication.transfer_s == pytest.approx(sent)


def test_small_models_on_a_cpu() -> None:
    config = load_config(["learner.threads=1"])
    plan = make_plan(config, read_cluster("laptop"), SHORT)
    assert misfits(config, plan) == [] and best_layout(config, plan, SHORT) is None
    processes = plan.learner.peak() + 2 * plan.engine.memory.peak() + 3 * 0.5 * GIB
    # Ray's store holds the policy for the engines and for the evaluator, and the learner copies it.
    assert plan.host_bytes == pytest.approx(processes + 3 * 4 * plan.shape.parameters)
    assert plan.generation_s < plan.learning.seconds  # the learner limits the main job
    inline = make_plan(load_config(["launcher=inline"]), read_cluster("laptop"), SHORT)
    assert inline.host_parts == ()
    large = load_config(["engine.max_slots=100000"])
    (misfit,) = misfits(large, make_plan(large, read_cluster("laptop"), SHORT))
    assert misfit.component == "host memory"
    fitting = re.search(r"; engine\.max_slots=(\d+) fits$", misfit.text)
    assert fitting is not None
    for slots, holds in ((int(fitting[1]), True), (2 * int(fitting[1]), False)):
        tried = load_config([f"engine.max_slots={slots}"])
        assert (misfits(tried, make_plan(tried, read_cluster("laptop"), SHORT)) == []) == holds


def test_what_cannot_be_planned_is_refused() -> None:
    cases: list[tuple[list[str], str, str]] = [
        ([], "h100_64", r"learner\.device is cpu, but the cluster has 8 GPUs in each node: set learner\.device=cuda"),
        (["learner.device=cuda"], "laptop", r"learner\.device is cuda, but the cluster has no GPUs"),
        (
            ["learner.device=cuda", "engine.device=cuda", "launcher.gpus_per_actor=0.5"],
            "h100_64",
            r"is 0\.5, expected 1",
        ),
        (["learner.device=cuda", "engine.device=cuda", "launcher=inline"], "h100_64", "set launcher=ray"),
    ]
    for overrides, cluster, expected in cases:
        with pytest.raises(ConfigError, match=expected):
            make_plan(load_config(overrides), read_cluster(cluster), SHORT)


def test_algorithms_decide_which_passes_are_made() -> None:
    def flops(*overrides: str) -> float:
        return paper(*overrides)[1].learning.flops

    forward = flops() / 10  # π_prox, values, and 4 times that of an update, with checkpointing, of policy and critic
    assert flops("algorithm.kl_coef=0.1") - flops() == pytest.approx(forward)
    assert flops("algorithm.critic_updates=2") - flops() == pytest.approx(4 * forward)
    assert flops() - flops("algorithm.importance=a3po") == pytest.approx(forward)
    with_critic, without = paper()[1].learner.stays, make_dapo().learner.stays
    assert {part.name for part in with_critic} - {part.name for part in without} == {"critic: parameters"}


def make_dapo() -> Plan:
    return make_plan(load_config(["experiment=dapo_qwen2.5_32b"]), read_cluster("h100_64"), LENGTHS)


def test_the_simulation_takes_the_plan() -> None:
    config, plan = paper()
    cluster = parse_cluster(simulated_cluster(config, plan))
    assert (cluster.batch.groups, cluster.batch.group_size, cluster.rollout.workers) == (512, 16, 5)
    assert cluster.learner.tokens_per_s is not None
    assert cluster.learner.tokens_per_s * plan.learning.seconds == pytest.approx(plan.batch_tokens)
    assert cluster.publication.recompute_kv and cluster.transfer_s == plan.publication.transfer_s


def test_the_text_adds_up_and_the_data_hold_the_same() -> None:
    config, plan = paper()
    text = plan_text(config, plan)
    learner = text.split("learner, a GPU, GiB\n")[1].split("\n\n")[0].splitlines()
    sizes = [float(line.split()[-1]) for line in learner[:-1]]
    total = float(learner[-1].split()[2])
    assert sum(sizes) == pytest.approx(total, abs=0.1)
    assert max(len(line) for line in text.splitlines()) <= 120
    data: dict[str, Any] = plan_data(plan, [], ["a note"])
    assert data["fits"] and data["notes"] == ["a note"]
    assert data["learner_peak_bytes"] / GIB + 4 == pytest.approx(total, abs=0.01)
    assert data["overlapped_s"] == pytest.approx(max(plan.generation_s, data["learning_s"] + 2.1), rel=0.01)


def test_a_layout_of_another_size_is_planned_without_another_configuration() -> None:
    config, plan = paper()
    layout = replace(layout_of(config), ranks=56)
    assert make_plan(config, plan.cluster, LENGTHS, layout).learner.peak() < plan.learner.peak()


def test_models_without_known_sizes_are_refused() -> None:
    config, plan = paper()
    unknown = replace(config, model=FolderModelConfig(path="Qwen/Qwen9"))
    with pytest.raises(ConfigError, match=r"model\.path=Qwen/Qwen9"):
        make_plan(unknown, plan.cluster, LENGTHS)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (119, "119 s"), (150, "2.5 min"), (7300, "2.03 h"), (10**6, "11.6 days")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
