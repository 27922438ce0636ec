"""What a device could do: the peaks that measured speeds are set beside."""

import re
from dataclasses import dataclass, replace
from typing import Final

import torch

from vapo_async.planning.cluster import GIB, Cluster, Device, read_cluster


@dataclass(frozen=True)
class Peak:
    """Of one GPU, as its maker says."""

    flops: float
    """bfloat16, dense, FLOP/s."""
    memory_gb_s: float


PEAKS: Final = {
    r"A100-(SXM4?|PCIE)-40GB": Peak(312e12, 1555),
    r"A100-SXM4?-80GB": Peak(312e12, 2039),
    r"A100 80GB PCIe": Peak(312e12, 1935),
    r"H100 80GB HBM3": Peak(989e12, 3350),
    r"H200": Peak(989e12, 4800),
    r"B200": Peak(2250e12, 8000),
    r"L40S": Peak(362e12, 864),
    r"GeForce RTX 4090": Peak(165e12, 1008),
}
"""By torch's name of the device without its maker. The whole name has to fit: parts of a GPU and its smaller sisters
(``H100 PCIe``, ``RTX 4090 D``, ``… MIG 3g.40gb``) have other peaks."""


def peak_of(name: str) -> Peak | None:
    """None where it is not known."""
    short = name.removeprefix("NVIDIA ")
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, short)), None)


def cluster_of(name: str, memory_gib: float) -> Cluster | None:
    """One GPU, for a plan: its own peaks, what the shipped clusters say of all else. None where they are not known."""
    peak = peak_of(name)
    if peak is None:
        return None
    like = read_cluster("h100_64")
    device = Device(peak.flops, peak.memory_gb_s, memory_gib, like.device.overhead_gib)
    return replace(like, name=f"1 × {name}", nodes=1, node=replace(like.node, gpus=1), device=device)


def own_cluster(device: str) -> Cluster | None:
    """This machine's first GPU; of a CPU the shipped laptop."""
    if device == "cpu":
        return read_cluster("laptop")
    properties = torch.cuda.get_device_properties(0)
    return cluster_of(properties.name, properties.total_memory / GIB)


def device_name(device: str) -> str:
    """As torch names it."""
    return torch.cuda.get_device_name(0) if device == "cuda" else device


def no_peak(name: str) -> str:
    """Why there is no MFU."""
    if name == "cpu":
        return "no MFU: the benchmark knows peaks of GPUs only"
    return f"no MFU: the dense bfloat16 peak of {name} is not in benchmarks/gpu_parts/devices.py"
