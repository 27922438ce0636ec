"""Weights in a file in memory: processes on one machine map it instead of receiving copies.

The file has no name in any folder and no limit but the memory's: it is found through its owner, as
``/proc/<pid>/fd/<n>``, and is gone when the owner closes it or ends, however it ends.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from safetensors.torch import save
from torch import Tensor


@contextmanager
def shared(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Path of a safetensors file with ``tensors``, while it is open. Who has mapped it keeps what it mapped.

    Args:
        tensors: contiguous, on the CPU.
    """
    descriptor = os.memfd_create("vapo_async_weights")
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(save(dict(tensors)))
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
