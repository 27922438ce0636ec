"""What does not fit is told in one line with settings that do fit."""

import re
from dataclasses import replace

import pytest

from vapo_async.config import Config
from vapo_async.config.load import load_config
from vapo_async.planning.advice import with_settings
from vapo_async.planning.cluster import Cluster, read_cluster
from vapo_async.planning.fit import best_layout, fits, misfits
from vapo_async.planning.lengths import ResponseLengths
from vapo_async.planning.plan import Plan, make_plan

LENGTHS = ResponseLengths(4096, 0.8, 20_480, 200)
H100 = read_cluster("h100_64")


def paper(*overrides: str, cluster: Cluster = H100) -> tuple[Config, Plan]:
    config = load_config(["experiment=paper_qwen2.5_32b", *overrides])
    return config, make_plan(config, cluster, LENGTHS)


def told(*overrides: str, cluster: Cluster = H100) -> list[str]:
    return [misfit.text for misfit in misfits(*paper(*overrides, cluster=cluster))]


def small_hosts(memory_gib: float) -> Cluster:
    return replace(H100, node=replace(H100.node, memory_gib=memory_gib))


LEARNER = "a learner's GPU needs "


@pytest.mark.parametrize(
    ("overrides", "cluster", "text", "settings"),
    [
        (["learner.activation_checkpointing=false"], H100, LEARNER, "learner.activation_checkpointing=true"),
        (["learner.zero_stage=2"], H100, rf"{LEARNER}.* the most of it policy: parameters \(61\.0 GiB\)",
         "learner.zero_stage=3"),
        (["learner.max_tokens_per_microbatch=90112"], H100, f"{LEARNER}.*activations",
         "learner.max_tokens_per_microbatch=22528"),
        (["learner.mismatch_versions=40"], H100, rf"{LEARNER}.*older policies \(40\) \(61\.0 GiB\)",
         "learner.mismatch_versions=6"),
        # 1.9 GiB too much, and the largest part is another one
        (["learner.mismatch_versions=8"], H100, rf"{LEARNER}.*1\.9 GiB too much, the most of it activations",
         "learner.mismatch_versions=6"),
        (["model.dtype=float32"], H100, f"{LEARNER}.*activations", "learner.offload_optimizer=true"),
        (["learner.ranks=8", "launcher.rollout_workers=7"], H100, LEARNER, "learner.ranks=32"),
        (["learner.ranks=8", "launcher.rollout_workers=13", "learner.mismatch_versions=0"], H100, LEARNER,
         "learner.ranks=32 launcher.rollout_workers=7"),
        (["learner.zero_stage=2", "learner.activation_checkpointing=false"], H100, LEARNER,
         "learner.activation_checkpointing=true learner.zero_stage=3 learner.logprob_chunk_tokens=512 "
         "learner.mismatch_versions=0"),
        (["learner.offload_optimizer=true", "algorithm.groups_per_batch=4096"], H100,
         f"{LEARNER}.*the most of it batch", "algorithm.groups_per_batch=2048"),
        (["engine.tensor_parallel_size=1", "launcher.rollout_workers=23"], H100,
         r"a GPU of an engine has no room for one response of 22,528 tokens beside 6\d\.\d GiB",
         "engine.tensor_parallel_size=2 launcher.rollout_workers=11"),
        (["engine.tensor_parallel_size=5", "launcher.rollout_workers=3"], H100,
         r"4 engines, one of them the evaluator's, take 5 GPUs of one node each, .* room for 3 beside 40 ranks",
         "launcher.rollout_workers=2"),
        (["learner.offload_optimizer=true", "learner.ranks=32"], small_hosts(400), "a node's host would hold",
         "learner.offload_optimizer=false"),
    ],
)  # fmt: skip
def test_advice_is_followed_and_fits(overrides: list[str], cluster: Cluster, text: str, settings: str) -> None:
    """Whoever follows it is not told of that again."""
    found = [misfit for misfit in misfits(*paper(*overrides, cluster=cluster)) if re.search(text, misfit.text)]
    assert len(found) == 1, told(*overrides, cluster=cluster)
    assert found[0].text.endswith(f" {settings} fits") and "\n" not in found[0].text
    after = misfits(*paper(*overrides, *settings.split(), cluster=cluster))
    assert found[0].component not in {misfit.component for misfit in after if "unevenly" not in misfit.text}


def test_the_least_change_is_named() -> None:
    """One older policy more, or a node of ranks less, does not fit."""
    assert told("learner.mismatch_versions=7") != []
    assert len(told("learner.ranks=24", "launcher.rollout_workers=7")) == 1
    assert told("learner.ranks=32", "launcher.rollout_workers=7") == []


def test_where_nothing_helps_the_nearest_is_named() -> None:
    tiny = replace(H100, device=replace(H100.device, memory_gib=12.0))
    config, plan = paper(cluster=tiny)
    texts = {misfit.component: misfit.text for misfit in misfits(config, plan)}
    for component in ("learner", "engine"):
        found = re.search(r"; nothing that was tried fits; (.*) comes nearest, ([\d.]+) GiB too much", texts[component])
        assert found is not None, texts
        again = {m.component: m.over_gib for m in misfits(*paper(*found[1].split(), cluster=tiny))}
        assert again[component] == pytest.approx(float(found[2]), abs=0.06)


def test_a_host_is_told_of_a_broadcast() -> None:
    """Through Ray's store and files a node of two engines holds six policies of 61 GiB, with a broadcast three."""
    (text,) = told("engine.weight_transport=shared_memory", cluster=small_hosts(250))
    assert re.search(
        r"hold 366\.\d GiB and has 250\.0: 116\.\d GiB too much; engine\.weight_transport=broadcast fits", text
    )
    assert told(cluster=small_hosts(250)) == []


@pytest.mark.parametrize(
    ("cache_mb", "text", "right"),
    [
        # 79.1 GiB less 4 and less the parts beside the cache, 16.79
        (70_000, r"engine\.kv_cache_mb=70000 does not fit a GPU: 10\.0 GiB too much; lower it to 59712", 59_712),
        # 22,528 tokens of 64 KiB
        (
            100,
            r"engine\.kv_cache_mb=100 does not hold one response of 22,528 tokens: 1\.3 GiB .* raise it to 1408",
            1408,
        ),
    ],
)
def test_a_cache_of_its_own_size_has_its_own_reasons(cache_mb: int, text: str, right: int) -> None:
    (found,) = told(f"engine.kv_cache_mb={cache_mb}")
    assert re.search(text, found), found
    assert told(f"engine.kv_cache_mb={right}") == []
    further = right + 1 if right < cache_mb else right - 1
    assert len(told(f"engine.kv_cache_mb={further}")) == 1


def test_engines_need_a_node_each() -> None:
    """24 GPUs on three nodes hold three engines of five GPUs, however many are free."""
    uneven, crowded = told("engine.tensor_parallel_size=5", "launcher.rollout_workers=3")
    assert uneven == (
        "engine.tensor_parallel_size is 5, which cuts the model's 8 heads of keys and values unevenly: take 1, 2, 4, 8"
    )
    assert crowded.endswith("room for 3 beside 40 ranks of the learner: launcher.rollout_workers=2 fits")
    # The sixth node has two ranks, the last two have an engine each.
    assert told("engine.tensor_parallel_size=8", "learner.ranks=42", "launcher.rollout_workers=1") == []


def test_gpus_that_are_not_there_are_told() -> None:
    (text,) = told("learner.ranks=48")
    assert re.search(r"^72 GPUs are asked for \(learner 48, 6 engines of 4, .* has 64: 8 too many; lower", text)
    found = told("engine.tensor_parallel_size=20", "launcher.rollout_workers=1", "learner.ranks=24")
    assert any(text.startswith("an engine takes 20 GPUs of one node, a node has 8") for text in found)
    (text,) = told("engine.tensor_parallel_size=3")
    assert "is 3, which cuts the model's 40 attention heads unevenly: take 1, 2, 4, 8" in text


def test_ways_to_share_out_leave_engines_their_nodes() -> None:
    config, plan = paper("engine.tensor_parallel_size=8", "launcher.rollout_workers=2")
    best = best_layout(config, plan, LENGTHS)
    assert best is not None and fits(config, best) and best.layout.engines == (64 - best.layout.ranks) // 8
    config, plan = paper("engine.tensor_parallel_size=5", "launcher.rollout_workers=2")
    assert best_layout(config, plan, LENGTHS) is None  # no layout cuts the model evenly


def test_plain_torch_is_told_of_deepspeed() -> None:
    """With its own micro-batches: those of the other learner are not the same."""
    settings = [
        "model=folder",
        "model.path=Qwen/Qwen2.5-7B",
        "engine=vllm",
        "launcher=ray",
        "launcher.rollout_workers=2",
    ]
    settings += ["learner.device=cuda", "engine.device=cuda", "learner.activation_checkpointing=true"]
    config = load_config(settings)
    (misfit,) = misfits(config, make_plan(config, H100, ResponseLengths(42, 0.5, 128, 20)))
    found = re.search(r"; (learner=deepspeed learner\.zero_stage=3 .*) fits$", misfit.text)
    assert found is not None and "learner.max_tokens_per_microbatch=2048" in found[1], misfit.text
    config = load_config([*settings, *found[1].split()])
    assert misfits(config, make_plan(config, H100, ResponseLengths(42, 0.5, 128, 20))) == []


def test_settings_are_those_of_the_command_line() -> None:
    config = load_config(["experiment=paper_qwen2.5_32b"])
    settings = {"learner.ranks": 48, "engine.weight_transport": "shared_memory", "model.dtype": "float32"}
    assert with_settings(config, settings) == load_config(
        ["experiment=paper_qwen2.5_32b", *(f"{key}={value}" for key, value in settings.items())]
    )
    plain = load_config(["learner.device=cuda", "engine.device=cuda", "learner.threads=3"])
    sharded = with_settings(plain, {"learner": "deepspeed", "learner.zero_stage": 3, "learner.ranks": 4})
    asked = ["learner=deepspeed", "learner.zero_stage=3", "learner.ranks=4", "learner.max_tokens_per_microbatch=2048"]
    assert sharded == load_config(["learner.device=cuda", "engine.device=cuda", "learner.threads=3", *asked])
