"""Joins a Ray cluster, or starts a local one that only this machine can reach."""

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker

from vapo_async.config import ConfigError, RayLauncherConfig
from vapo_async.launcher.preflight import LOOPBACK, START_RAY, check_ray, ray_address, ray_address_source


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for one actor."""

    num_cpus: int = 0
    num_gpus: float = 0.0

    @classmethod
    def of(cls, threads: int, device: str, config: RayLauncherConfig) -> "Resources":
        """A CPU for each thread; ``launcher.gpus_per_actor`` where the device is not the CPU."""
        return cls(threads, 0.0 if device == "cpu" else config.gpus_per_actor)


def check_resources(needed: Sequence[Resources]) -> None:
    """Raises ``ConfigError`` if the cluster that was joined or started is too small."""
    have = ray.cluster_resources()
    for kind, wanted in (("CPU", sum(r.num_cpus for r in needed)), ("GPU", sum(r.num_gpus for r in needed))):
        if wanted > have.get(kind, 0):
            raise ConfigError(
                f"the run needs {wanted:g} {kind}s, the Ray cluster has {have.get(kind, 0):g}: lower "
                "launcher.rollout_workers, launcher.gpus_per_actor or the threads, or give the cluster more"
            )


def start_ray(config: RayLauncherConfig, cpus: int) -> bool:
    """Connects; returns True if a local Ray was started (and is to be stopped with the run).

    Raises:
        ConfigError: nobody answers at the address, or the port is taken.
    """
    check_ray(config)
    # A death is told in one line by whoever notices it; Ray's own paragraph would tear the live line apart.
    ray_worker.print_to_stdstream = _silent
    address = ray_address(config)
    if address is not None:
        _join(address, ray_address_source(config))
        return False
    os.environ.pop("RAY_ADDRESS", None)
    if config.port is not None:
        os.environ["RAY_GCS_SERVER_PORT"] = str(config.port)
    else:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Otherwise Ray turns a loopback address into the machine's own and listens on every interface.
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _node_ip_address=LOOPBACK,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    return True


def _silent(data: object, ignore_prefix: bool) -> None:
    """In the place of what prints the messages of Ray's own processes."""


def _join(address: str, where: str) -> None:
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}={address}: could not join this Ray cluster ({reason}); {START_RAY}") from error


def local_logs() -> Path:
    """Where the local Ray's processes write."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / context.get_session_name() / "logs"


def keep_logs(source: Path, target: Path) -> None:
    """Copies what the actors wrote: one file each for standard output and error, empty ones left out."""
    with suppress(OSError):  # a full disk, which may be why the run ends
        for path in source.glob("worker-*"):
            if path.stat().st_size:
                target.mkdir(exist_ok=True)
                shutil.copy(path, target)
