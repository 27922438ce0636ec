"""The cluster that a run is planned for, typed and read from YAML: ``configs/cluster/*.yaml`` or any other file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vapo_async.config import ConfigError
from vapo_async.config.described import read_described
from vapo_async.config.load import default_config_dir, nearest

MIB, GIB = 1 << 20, 1 << 30


@dataclass
class Node:
    """One machine."""

    gpus: int = 8
    """0: the run is on the CPU."""
    memory_gib: float = MISSING
    """Of the host."""
    memory_gb_s: float = 200.0
    """GB/s that the host reads and writes."""


@dataclass
class Device:
    """What computes: a GPU, or one process's share of the CPU."""

    flops: float = MISSING
    """Per second, in the dtype of the model, as its maker says."""
    memory_gb_s: float = MISSING
    """GB/s that it reads its own memory with."""
    memory_gib: float | None = None
    """Of a GPU, as torch sees it; null on a CPU: the host's."""
    overhead_gib: float = 0.0
    """Of each process: context, communication buffers, fragmentation."""


@dataclass
class Links:
    """GB/s in one direction."""

    gpu_gb_s: float = MISSING
    """Between two devices of a node."""
    network_gb_s: float = MISSING
    """Between nodes, for each device; without GPUs, for the node."""
    host_gb_s: float = MISSING
    """Between a device and its host."""


@dataclass
class Efficiency:
    """Shares of the numbers above that are reached."""

    learning_flops: float = 0.4
    """Share of the peak in forward and backward passes, of all that is computed: recomputation included."""
    prefill_flops: float = 0.5
    decode_memory: float = 0.7
    links: float = 0.7
    decode_step_ms: float = 5.0
    """Of every decode step: launches, communication between the ranks of an engine, sampling."""


@dataclass
class Cluster:
    """One file."""

    name: str = MISSING
    nodes: int = MISSING
    node: Node = field(default_factory=Node)
    device: Device = field(default_factory=Device)
    links: Links = field(default_factory=Links)
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.node.gpus

    @property
    def device_bytes(self) -> float:
        """Of one GPU; of a whole node where there is none."""
        gib = self.node.memory_gib if self.device.memory_gib is None else self.device.memory_gib
        return gib * GIB

    @property
    def host_bytes(self) -> float:
        """Of one node's host where there are GPUs, else of all nodes together."""
        return self.node.memory_gib * GIB * (1 if self.node.gpus else self.nodes)

    def collective_bytes_s(self, devices: int) -> float:
        """What one device sends in a ring of ``devices``; rings between nodes use all links of a node at once."""
        links, per_node = self.links, max(1, self.node.gpus)
        rate = links.gpu_gb_s if devices <= per_node else min(links.gpu_gb_s, per_node * links.network_gb_s)
        return rate * 1e9 * self.efficiency.links


def read_cluster(name: str, config_dir: Path | None = None) -> Cluster:
    """The shipped cluster of that name, or the one in a YAML file.

    Raises:
        ConfigError: one line for any mistake: file, key, found, expected.
    """
    folder = (default_config_dir() if config_dir is None else config_dir) / "cluster"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    path = folder / f"{name}.yaml" if name in known else Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"cluster={name} is none of {', '.join(known)}, nor a .yaml file{nearest(name, known)}")
    return read_described("cluster", path, parse_cluster)


def parse_cluster(loaded: object) -> Cluster:
    """The same from nested plain data."""
    if not isinstance(loaded, dict):
        raise ConfigError(f"the file is {loaded!r}, expected a section with keys")
    schema = OmegaConf.structured(Cluster)
    for name, value in _known("", loaded, schema).items():
        if OmegaConf.is_config(schema.get(name)):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} is {value!r}, expected a section with keys")
            _known(f"{name}.", value, schema[name])
    try:
        merged = OmegaConf.merge(schema, loaded)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"key '{missing[0]}' is missing")
        cluster = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error
    assert isinstance(cluster, Cluster)
    _check(cluster)
    return cluster


def _known(prefix: str, section: dict[Any, Any], schema: Any) -> dict[Any, Any]:
    """The section, all of whose keys the schema has."""
    names = [f"{prefix}{name}" for name in schema]
    for key in section:
        if f"{prefix}{key}" not in names:
            hint = nearest(f"{prefix}{key}", names) if isinstance(key, str) else ""
            raise ConfigError(f"unknown key '{prefix}{key}'{hint or '; there are ' + ', '.join(names)}")
    return section


def _check(cluster: Cluster) -> None:
    """Written so that .nan does not pass."""
    for section in ("", "node", "device", "links", "efficiency"):
        part = getattr(cluster, section) if section else cluster
        for name, value in vars(part).items():
            if not isinstance(value, int | float):
                continue
            key = f"{section}.{name}" if section else name
            zero = name in ("gpus", "overhead_gib", "decode_step_ms")
            share = section == "efficiency" and name != "decode_step_ms"
            wanted = "a share above 0, at most 1" if share else "a number ≥ 0" if zero else "a number > 0"
            if not ((value >= 0 if zero else value > 0) and value <= (1 if share else float("1e300"))):
                raise ConfigError(f"{key} is {value}, expected {wanted}")
    if (cluster.node.gpus == 0) != (cluster.device.memory_gib is None):
        raise ConfigError(
            f"device.memory_gib is {cluster.device.memory_gib} with node.gpus = {cluster.node.gpus}: give it for GPUs, "
            "leave it out without them"
        )
