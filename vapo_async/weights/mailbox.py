"""The newest published weights, waiting for an engine to take them between two decode steps."""

import threading
from collections.abc import Mapping

from torch import Tensor, nn


class Mailbox:
    """Thread-safe; holds one publication. A newer one replaces an older one that nobody took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: int | None = None
        self._tensors: Mapping[str, Tensor] | None = None

    def publish(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """``tensors=None`` says that ``version`` has the weights of the one before (value pretraining).

        Weights that nobody took yet are kept under such a version.
        """
        with self._lock:
            if self._version is not None and version <= self._version:
                raise ValueError(f"version {version} published after version {self._version}")
            if self._version is None or tensors is not None:
                self._tensors = tensors
            self._version = version

    def pull(self) -> tuple[int, Mapping[str, Tensor] | None] | None:
        """The publication that was not taken yet, or None."""
        with self._lock:
            if self._version is None:
                return None
            taken = (self._version, self._tensors)
            self._version, self._tensors = None, None
            return taken


def published_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters on the CPU, tied ones once, by name. Copies: the learner goes on training."""
    return {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()}
