"""Brings the learner's processes together, before the first model is built."""

import os
from datetime import timedelta

import deepspeed
import torch
from torch import distributed

from vapo_async.learner.ranks import TorchRanks


def join_ranks(host: str, port: int, *, rank: int, size: int, device: str, timeout_s: float) -> TorchRanks:
    """Returns once all ``size`` processes have called it: over gloo between CPUs, over NCCL between GPUs.

    Args:
        host: where rank 0 is.
        port: a free one there.
        rank: this process's, from 0.
        size: how many there are.
        device: ``cpu`` or ``cuda``.
        timeout_s: limit of this and of every later collective.
    """
    on_cpu = device == "cpu"
    # Each process has one device that it can see, wherever the others are.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size), "LOCAL_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, leaves files when killed
    backend = "gloo" if on_cpu else "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timedelta(seconds=timeout_s))
    assert distributed.get_world_size() == size
    return TorchRanks(torch.device(device))
