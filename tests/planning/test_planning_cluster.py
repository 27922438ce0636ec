"""Clusters: the shipped ones, and mistakes in one line each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vapo_async.config import ConfigError
from vapo_async.config.load import default_config_dir
from vapo_async.planning.cluster import GIB, parse_cluster, read_cluster

SHIPPED = sorted(path.stem for path in (default_config_dir() / "cluster").glob("*.yaml"))
SMALLEST: dict[str, Any] = {
    "name": "one",
    "nodes": 2,
    "node": {"gpus": 4, "memory_gib": 100},
    "device": {"flops": 1e12, "memory_gb_s": 1000, "memory_gib": 10},
    "links": {"gpu_gb_s": 100, "network_gb_s": 10, "host_gb_s": 20},
    "efficiency": {"links": 0.5},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_clusters_are_read(name: str) -> None:
    cluster = read_cluster(name)
    assert cluster.gpus == {"h100_64": 64, "h100_128": 128, "laptop": 0}[name]
    text = (default_config_dir() / "cluster" / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()[0]) > 20


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    cluster = read_cluster(str(path))
    assert (cluster.gpus, cluster.device_bytes, cluster.host_bytes) == (8, 10 * GIB, 100 * GIB)
    assert cluster.efficiency.decode_memory == 0.7  # the default


def test_rings_inside_a_node_and_between_nodes() -> None:
    cluster = parse_cluster(SMALLEST)
    assert cluster.collective_bytes_s(4) == 0.5 * 100e9
    assert cluster.collective_bytes_s(5) == 0.5 * 40e9  # four links of 10 GB/s leave a node
    wide = parse_cluster({**SMALLEST, "links": {"gpu_gb_s": 30, "network_gb_s": 10, "host_gb_s": 20}})
    assert wide.collective_bytes_s(8) == 0.5 * 30e9  # no faster than inside


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("node", "gpu", 4, "unknown key 'node.gpu'; did you mean 'node.gpus'?"),
        ("", "linkz", {}, "unknown key 'linkz'"),
        ("", "qqq", 1, "unknown key 'qqq'; there are name, nodes, node, device, links, efficiency"),
        ("", 5, 1, "unknown key '5'; there are name, nodes, node, device, links, efficiency"),
        ("", None, 1, "unknown key 'None'; there are name, nodes, node, device, links, efficiency"),
        ("node", 7, 1, "unknown key 'node.7'; there are node.gpus, node.memory_gib, node.memory_gb_s"),
        ("", "nodes", "many", "nodes: Value 'many' of type 'str' could not be converted to Integer"),
        ("", "nodes", 0, "nodes is 0, expected a number > 0"),
        ("", "node", 3, "node is 3, expected a section with keys"),
        ("device", "flops", float("nan"), "device.flops is nan, expected a number > 0"),
        ("device", "flops", float("inf"), "device.flops is inf, expected a number > 0"),
        ("device", "overhead_gib", -1, "device.overhead_gib is -1.0, expected a number ≥ 0"),
        ("device", "memory_gib", None, "device.memory_gib is None with node.gpus = 4: give it for GPUs"),
        ("node", "gpus", 0, "device.memory_gib is 10.0 with node.gpus = 0"),
        ("efficiency", "learning_flops", 1.2, "efficiency.learning_flops is 1.2, expected a share above 0, at most 1"),
        ("efficiency", "links", 0, "efficiency.links is 0.0, expected a share above 0, at most 1"),
        ("links", "gpu_gb_s", "???", "key 'links.gpu_gb_s' is missing"),
    ],
)
def test_a_mistake_is_one_line(section: str, key: object, value: object, told: str, tmp_path: Path) -> None:
    loaded: dict[Any, Any] = {name: dict(p) if isinstance(p, dict) else p for name, p in SMALLEST.items()}
    (loaded[section] if section else loaded)[key] = value
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(loaded))
    with pytest.raises(ConfigError) as error:
        read_cluster(str(path))
    assert str(error.value).startswith(f"{path}: {told}") and "\n" not in str(error.value)


def test_what_is_no_cluster_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster=h100_65 is none of .*h100_64.* did you mean 'h100_64'\?"):
        read_cluster("h100_65")
    with pytest.raises(ConfigError, match=r"cannot read the cluster .*No such file"):
        read_cluster(str(tmp_path / "absent.yaml"))
    for text, told in (("[", "is not valid YAML"), ("", "the file is None, expected a section with keys")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_cluster(str(tmp_path / "x.yaml"))
    with pytest.raises(ConfigError, match=r"key 'device\.flops' is missing"):
        parse_cluster({**SMALLEST, "device": {"memory_gb_s": 1, "memory_gib": 1}})
