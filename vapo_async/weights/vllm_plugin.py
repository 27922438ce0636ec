"""What vLLM runs in every process of its own: entry point of the group ``vllm.general_plugins``."""

import ctypes
import multiprocessing
import os
import signal
from typing import Final

SHARED_MEMORY: Final = "vapo_async_shared_memory"
GLOO: Final = "vapo_async_gloo"
NCCL: Final = "vapo_async_nccl"
"""Names of weight transfers, all of which also read :mod:`vapo_async.weights.shared_memory`."""
_RECEIVERS = {SHARED_MEMORY: "FileReceiver", GLOO: "GlooReceiver", NCCL: "NCCLReceiver"}
_PR_SET_PDEATHSIG = 1


def register() -> None:
    """Makes the weight transfers known to vLLM, and ends vLLM's processes with the one that started them.

    vLLM may call it more than once in a process.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if SHARED_MEMORY in WeightTransferEngineFactory._registry:
        return
    for backend, receiver in _RECEIVERS.items():
        WeightTransferEngineFactory.register_engine(backend, "vapo_async.weights.vllm_receiver", receiver)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Otherwise an engine whose owner is killed would go on, and hold its memory.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # killed before that
            os.kill(os.getpid(), signal.SIGKILL)
