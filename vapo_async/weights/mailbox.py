"""The newest published weights, waiting for an engine to take them between two decode steps."""

import threading
from typing import Generic, TypeVar

from torch import Tensor, nn

W = TypeVar("W")
"""Weights, or the way to them."""


class Mailbox(Generic[W]):
    """Thread-safe; holds one publication. A newer one replaces an older one that nobody took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version: int | None = None
        self._weights: W | None = None

    def publish(self, version: int, weights: W | None) -> None:
        """``weights=None`` says that ``version`` has those of the one before (value pretraining).

        Weights that nobody took yet are kept under such a version.
        """
        with self._lock:
            if self._version is not None and version <= self._version:
                raise ValueError(f"version {version} published after version {self._version}")
            if self._version is None or weights is not None:
                self._weights = weights
            self._version = version

    def pull(self) -> tuple[int, W | None] | None:
        """The publication that was not taken yet, or None."""
        with self._lock:
            if self._version is None:
                return None
            taken = (self._version, self._weights)
            self._version, self._weights = None, None
            return taken


def published_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters on the CPU, tied ones once, by name. Copies: the learner goes on training."""
    return {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()}
