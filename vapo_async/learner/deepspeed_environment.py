"""What has to hold before DeepSpeed is imported: it is installed, and its environment variables say how it runs."""

import importlib.util
import os

from vapo_async.config import ConfigError


def check_deepspeed() -> None:
    """Without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "learner=deepspeed: DeepSpeed is not installed here; install the extra deepspeed, as in "
            "`pip install -e '.[deepspeed]'`, or use learner=torch"
        )


def prepare_deepspeed(device: str) -> None:
    """Sets this process's environment; what the user has set stays.

    Args:
        device: of the learner.
    """
    check_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device == "cpu" else "cuda")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
