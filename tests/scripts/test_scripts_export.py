"""Exported folders load where Hugging Face's do, and compute what the learner computed."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, tiny_policy
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import vapo_async.export
from vapo_async.config import TorchLearnerConfig
from vapo_async.config.algorithm import AdvantageKind, AlgorithmConfig
from vapo_async.learner.checkpoint import save_learner
from vapo_async.learner.learner import Learner
from vapo_async.learner.models import Critic, policy_log_probs
from vapo_async.models.char_tokenizer import build_char_tokenizer

main: Callable[[list[str]], int] = runpy.run_path(str(REPOSITORY / "scripts" / "export.py"))["main"]
VOCAB = 18
TOKENS = torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)


def make_checkpoint(folder: Path, family: str = "qwen2", *, tied: bool = True, critic: bool = True) -> Learner:
    """Of a learner whose critic is no zero."""
    policy = tiny_policy(VOCAB, family=family, tied=tied)
    kind = AdvantageKind.gae if critic else AdvantageKind.group
    learner = Learner(
        AlgorithmConfig(advantage=kind),
        TorchLearnerConfig(),
        policy,
        Critic.from_policy(policy) if critic else None,
        temperature=1.0,
        seed=0,
    )
    if learner.critic is not None:
        torch.nn.init.normal_(learner.critic.value_head.weight)
        torch.nn.init.constant_(learner.critic.value_head.bias, 0.3)
    folder.mkdir(parents=True)
    save_learner(learner, build_char_tokenizer(), folder)
    return learner


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("llama", True)])
def test_the_policy_has_equal_log_probs(
    family: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = make_checkpoint(tmp_path / "step", family, tied=tied)
    assert main([str(tmp_path / "step"), str(tmp_path / "out")]) == 0
    assert f"written to    {tmp_path / 'out'} (1 file of weights)" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        one, other = (
            policy_log_probs(policy, TOKENS, MASK, temperature=1.0, chunk_tokens=64)[0]
            for policy in (learner.policy, loaded)
        )
    assert torch.equal(one, other)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(build_char_tokenizer())
    assert (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_critics_logit_is_the_value_of_the_next_state(family: str, tmp_path: Path) -> None:
    learner = make_checkpoint(tmp_path / "step", family)
    assert main([str(tmp_path / "step"), str(tmp_path / "out"), "--critic"]) == 0
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    assert learner.critic is not None
    with torch.no_grad():
        values = learner.critic(TOKENS, MASK)[:, 1:]
        logits = loaded(input_ids=TOKENS).logits[:, :-1, 0]
    assert float(values.abs().max()) > 0.1
    torch.testing.assert_close(logits, values, atol=1e-6, rtol=0)


def test_several_files_and_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_checkpoint(tmp_path / "step")
    monkeypatch.setattr(vapo_async.export, "SHARD_BYTES", 30_000)
    assert main([str(tmp_path / "step"), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for (name, p), q in zip(learner.policy.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.to(torch.bfloat16), q), name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage", "critic"),
    [
        ("policy/model.safetensors", truncate, False),
        ("policy/model.safetensors", lambda path: path.write_bytes(b""), False),
        ("policy/model.safetensors", Path.unlink, False),
        ("policy/config.json", truncate, False),
        ("policy/config.json", lambda path: path.write_text("[]"), False),
        ("policy/config.json", lambda path: path.write_text('{"architectures": ["A"]}'), True),
        ("policy/config.json", Path.unlink, True),
        ("critic.safetensors", truncate, True),
    ],
)
def test_a_broken_checkpoint_is_told_as_such(
    file: str, damage: Callable[[Path], object], critic: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "step")
    damage(tmp_path / "step" / file)
    assert main([str(tmp_path / "step"), str(tmp_path / "out"), *["--critic"] * critic]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the checkpoint is broken: ") and error.count("\n") == 1, error
    assert file.split("/")[-1].split(".")[0] in error and str(tmp_path / "out") not in error
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_lost_file_of_several_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "step")
    monkeypatch.setattr(vapo_async.export, "SHARD_BYTES", 30_000)
    assert main([str(tmp_path / "step"), str(tmp_path / "several" / "policy")]) == 0
    lost = sorted((tmp_path / "several" / "policy").glob("model-*"))[-1]
    lost.unlink()
    capsys.readouterr()
    assert main([str(tmp_path / "several"), str(tmp_path / "out")]) == 1
    assert f": {lost.name} is missing, or lacks tensors" in capsys.readouterr().err


def test_a_target_that_cannot_be_written_is_told_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "step")
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "step"), str(tmp_path / "file" / "out")]) == 1
    assert f"error: {tmp_path / 'file' / 'out'} could not be written: Not a directory" in capsys.readouterr().err

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(vapo_async.export, "save_file", full)
    assert main([str(tmp_path / "step"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'out'} could not be written: I/O error: No space left" in error
    assert error.count("\n") == 1 and {path.name for path in tmp_path.iterdir()} == {"step", "file"}


def test_what_stands_beside_the_target_is_left_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "step")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    assert main([str(tmp_path / "step"), str(tmp_path / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"step", "out", "out.partial"}
    assert (tmp_path / "out.partial" / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{step}"], "expected FOLDER and OUT, found 1 folder"),
        (["{step}", "{step}"], "exists: give a folder that is to be made"),
        (["{step}", "{out}", "--dtype", "int8"], "--dtype is 'int8', expected float32"),
        (["{step}", "{out}", "--crtic"], "unknown option '--crtic'"),
        (["{out}", "{out}"], "is no run and no checkpoint of one"),
        (["{step}", "{out}", "--critic"], "no critic in"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "step", critic=False)
    places = {"step": tmp_path / "step", "out": tmp_path / "out"}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
