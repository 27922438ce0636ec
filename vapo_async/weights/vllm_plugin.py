"""What vLLM runs in every process of its own: entry point of the group ``vllm.general_plugins``."""

import ctypes
import multiprocessing
import os
import signal
from typing import Final

BACKEND: Final = "vapo_async_shared_memory"
"""Name of the weight transfer through :mod:`vapo_async.weights.shared_memory`."""
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Makes :data:`BACKEND` known to vLLM, and ends vLLM's processes with the one that started them.

    vLLM may call it more than once in a process.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    module = "vapo_async.weights.vllm_receiver"
    WeightTransferEngineFactory.register_engine(BACKEND, module, "SharedMemoryReceiver")
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Otherwise an engine whose owner is killed would go on, and hold its memory.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # killed before that
            os.kill(os.getpid(), signal.SIGKILL)
