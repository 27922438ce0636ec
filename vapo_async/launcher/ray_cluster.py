"""Joins a Ray cluster, or starts a local one that only this machine can reach."""

import logging
import os

import ray
from ray._private import ray_constants

from vapo_async.config import ConfigError, RayLauncherConfig
from vapo_async.launcher.preflight import LOOPBACK, START_RAY, check_ray, ray_address, ray_address_source


def start_ray(config: RayLauncherConfig, cpus: int) -> bool:
    """Connects; returns True if a local Ray was started (and is to be stopped with the run).

    Raises:
        ConfigError: nobody answers at the address, or the port is taken.
    """
    check_ray(config)
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


def _join(address: str, where: str) -> None:
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}={address}: could not join this Ray cluster ({reason}); {START_RAY}") from error
