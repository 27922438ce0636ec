"""Joins a Ray cluster, or starts a local one that only this machine can reach."""

import logging
import os
import socket
from contextlib import closing

import ray

from vapo_async.config import ConfigError, RayLauncherConfig

_LOOPBACK = "127.0.0.1"


def start_ray(config: RayLauncherConfig, cpus: int) -> bool:
    """Connects; returns True if a local Ray was started (and is to be stopped with the run).

    Raises:
        ConfigError: nobody answers at the address, or the port is taken.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _join(address, config)
        return False
    os.environ.pop("RAY_ADDRESS", None)
    if config.port is not None:
        _check_port_free(config.port)
        os.environ["RAY_GCS_SERVER_PORT"] = str(config.port)
    else:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _node_ip_address=_LOOPBACK,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    return True


def _join(address: str, config: RayLauncherConfig) -> None:
    where = "launcher.address" if config.address else "RAY_ADDRESS"
    _check_answers(address, where, config.connect_timeout_s)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}={address}: could not join this Ray cluster ({reason}); {_WAY_OUT}") from error


_WAY_OUT = "start one there with `ray start --head`, or unset it to get a local Ray"


def _check_answers(address: str, where: str, timeout_s: float) -> None:
    """A plain TCP connection first: Ray itself waits minutes and then aborts the process."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{where}={address}: expected host:port, ray://host:port, 'auto' or 'local'")
    try:
        with closing(socket.create_connection((host, int(port)), timeout=timeout_s)):
            return
    except OSError as error:
        raise ConfigError(f"{where}={address}: nobody answers there ({error.strerror or error}); {_WAY_OUT}") from error


def _check_port_free(port: int) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind((_LOOPBACK, port))
        except OSError as error:
            raise ConfigError(
                f"launcher.port={port}: cannot be used on {_LOOPBACK} ({error.strerror}); "
                "choose another, or null for a free one"
            ) from error
