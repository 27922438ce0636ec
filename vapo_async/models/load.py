"""From a model's config to a Hugging Face folder, and from the folder to what trains and generates."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from vapo_async.config import ConfigError, EmbeddedModelConfig, FolderModelConfig, ModelConfig, SmolLM2ModelConfig
from vapo_async.models.embedded import ensure_embedded
from vapo_async.models.smollm2 import ensure_smollm2

disable_progress_bar()  # the run has a progress line of its own
# Saving a model imports DeepSpeed where that is installed, and without a GPU it says so.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def ensure_model(config: ModelConfig, progress: Callable[[str], None]) -> Path:
    """The folder of the base policy; makes or fetches it where it is not there yet."""
    match config:
        case EmbeddedModelConfig():
            return ensure_embedded(config, progress)
        case SmolLM2ModelConfig():
            return ensure_smollm2(config, progress)
        case FolderModelConfig():
            return ensure_folder_or_hub(config.path, progress)
    raise ConfigError(
        f"model has type {type(config).__name__}; expected embedded, folder or smollm2: choose with model="
    )


def ensure_tokenizer(config: ModelConfig, model_folder: Path) -> Path:
    """The tokenizer's folder: the model's own, unless ``model.tokenizer_path`` names another."""
    if isinstance(config, FolderModelConfig) and config.tokenizer_path is not None:
        folder = Path(config.tokenizer_path).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"tokenizer folder not found: {folder}; correct model.tokenizer_path")
        return folder
    return model_folder


def ensure_folder_or_hub(path_or_name: str, progress: Callable[[str], None]) -> Path:
    """A checked local folder, or the local snapshot of a hub name such as ``org/name``."""
    folder = Path(path_or_name).expanduser()
    if folder.exists():
        return check_model_folder(folder)
    if path_or_name.startswith((".", "/", "~")) or path_or_name.count("/") != 1:
        raise ConfigError(
            f"model folder not found: {path_or_name}; expected a Hugging Face folder or a hub name org/name"
        )
    return check_model_folder(_snapshot(path_or_name, progress))


def check_model_folder(folder: Path) -> Path:
    """``folder``, if it has a config and weights."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a Hugging Face model folder: no config.json; "
            "give the folder that save_pretrained wrote, or a hub name org/name"
        )
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise ConfigError(
            f"{folder} is not a Hugging Face model folder: no weights ({' or '.join(_WEIGHTS)}); "
            "give the folder that save_pretrained wrote"
        )
    return folder


def check_loadable(folder: Path) -> None:
    """Reads the model's configuration and the heads of its weight files, not the weights."""
    try:
        AutoConfig.from_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loadable(folder, error) from error


def check_device(key: str, device: str) -> None:
    """Raises :class:`ConfigError` naming ``key`` unless torch sees ``device`` (cpu, cuda, cuda:<n>) in this process."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        found = f"{count} CUDA device(s)" if count else "no CUDA device"
        build = "" if torch.version.cuda else " (a build for the CPU)"
        raise ConfigError(
            f"{key}={device}: torch {torch.__version__}{build} sees {found}; set {key}=cpu or another one"
        )


def _not_loadable(folder: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:160]
    return ConfigError(
        f"{folder} cannot be loaded as a causal language model: {reason}; give the folder that save_pretrained wrote"
    )


def _snapshot(name: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download  # only where there is a hub

    progress(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(
            f"model '{name}' is no local folder and could not be fetched from the Hugging Face hub ({reason}); "
            "give the path of a model folder, or use model=embedded or model=smollm2"
        ) from error


def load_policy(path: Path, dtype: str) -> PreTrainedModel:
    """The causal language model in a folder, in evaluation mode, with SDPA attention."""
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype is '{dtype}'; expected one of {', '.join(DTYPES)}")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], attn_implementation="sdpa")
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loadable(path, error) from error
    return model.eval()


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; its end token also pads where it has no padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"{path} holds no tokenizer that can be loaded: {reason}; set model.tokenizer_path"
        ) from error
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer in {path} has no end token (eos_token); set it in tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
