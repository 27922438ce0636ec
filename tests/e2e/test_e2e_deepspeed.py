"""Runs whose learner is DeepSpeed over two ranks, as a user starts them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPOSITORY
from running import command, newest_run, start, wait_for
from safetensors import safe_open
from test_e2e_learning import train
from test_e2e_ray_faults import assert_balanced, of_stage, summary_of
from transformers import AutoModelForCausalLM

from vapo_async.checkpoint import list_checkpoints
from vapo_async.learner.models import policy_log_probs

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(600)]

TWO = ("launcher=ray", "learner=deepspeed", "learner.ranks=2", "evaluation.every=0")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "broadcast"])
def test_a_run_with_vllm_and_all_parameters_in_parts_is_right_after_every_update(
    base_folder: Path, tmp_path: Path, transport: str
) -> None:
    """Engine and learner are compared with every batch."""
    log = tmp_path / "log"
    more = (
        *TWO,
        "learner.zero_stage=3",
        "engine=vllm",
        f"engine.weight_transport={transport}",
        "steps=20",
        "task.max_response_tokens=40",
        "algorithm.policy_lr=1e-3",
    )
    process = start(command(base_folder, tmp_path, *more, "engine.max_mismatch=1e-3"), log)
    assert process.wait(timeout=500) == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()
    run_dir = newest_run(tmp_path)
    summary = summary_of(run_dir)
    assert_balanced(summary)
    assert summary["status"] == "finished" and summary["versions"] == 21
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row.get("engine_mismatch_tokens", 0) > 0]
    assert len(measured) > 15 and max(row["engine_mismatch_max"] for row in measured) < 1e-3
    policy = list_checkpoints(run_dir)[-1] / "policy"
    assert sorted(path.name for path in policy.glob("*.safetensors")) == [
        f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)
    ]
    assert_export_is_of_use(run_dir, tmp_path)


ASK_VLLM = """
import json, sys
from vapo_async.collector.vllm_environment import prepare_vllm
prepare_vllm("cpu", 1)
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, rows, answer = sys.argv[1:]
    model = LLM(model=folder, dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = model.generate([{"prompt_token_ids": row} for row in json.loads(rows)], sampling, use_tqdm=False)
    found = [[at[i].logprob for at, i in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:])] for o in outputs]
    open(answer, "w").write(json.dumps(found))
"""


def assert_export_is_of_use(run_dir: Path, folder: Path) -> None:
    """Transformers and vLLM, as anyone would use it, load the exported policy and give equal log-probs."""
    out, answer = folder / "exported", folder / "answer.json"
    export = [sys.executable, str(REPOSITORY / "scripts" / "export.py"), str(run_dir), str(out)]
    assert subprocess.run(export, timeout=120).returncode == 0
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.randint(0, loaded.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)
    with torch.no_grad():
        expected, _ = policy_log_probs(loaded, tokens, mask, temperature=1.0, chunk_tokens=64)
    (folder / "ask.py").write_text(ASK_VLLM)
    ask = [sys.executable, str(folder / "ask.py"), str(out), json.dumps(tokens.tolist()), str(answer)]
    asked = subprocess.run(ask, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    torch.testing.assert_close(torch.tensor(json.loads(answer.read_text())), expected[:, 1:], atol=1e-4, rtol=0)
    assert float(expected[:, 1:].std()) > 0.5


def test_a_dead_rank_ends_the_run_which_goes_on_with_one_rank(base_folder: Path, tmp_path: Path) -> None:
    log, again = tmp_path / "log", tmp_path / "again"
    process = start(command(base_folder, tmp_path, *TWO, "checkpoint.every=3", "steps=100000"), log)
    wait_for(log, "policy 5/", process, timeout_s=200)
    ranks = of_stage(process, "LearnerActor")
    assert len(ranks) == 2
    ranks[1].kill()
    assert process.wait(timeout=60) == 1, log.read_text()
    assert re.search(r"^error: .*learner.*died", log.read_text(), re.MULTILINE), log.read_text()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive, "the other rank does not wait for what will not come"
    more = (*TWO, "learner.ranks=1", "learner.zero_stage=1", "steps=20", "resume=auto")
    process = start(command(base_folder, tmp_path, *more), again)
    assert process.wait(timeout=300) == 0, again.read_text()
    run_dir = newest_run(tmp_path)
    assert summary_of(run_dir)["status"] == "finished"
    with safe_open(list_checkpoints(run_dir)[-1] / "policy" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_job_passes_its_bar_over_two_ranks(tmp_path: Path) -> None:
    summary = train(tmp_path, "learner=deepspeed", "learner.ranks=2", timeout_s=3500)
    assert summary["final_accuracy"] >= 0.75
    assert summary["final_accuracy"] - summary["base_accuracy"] >= 0.35
