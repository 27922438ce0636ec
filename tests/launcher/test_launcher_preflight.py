"""What is checked before a run starts, and that a run which cannot start leaves no folder."""

import dataclasses
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from vapo_async.config import Config, ConfigError, RayLauncherConfig
from vapo_async.launcher import run
from vapo_async.launcher.preflight import check_ray, check_writable, preflight
from vapo_async.metrics.console import Console


@pytest.fixture
def web_server() -> Iterator[int]:
    """A port where somebody answers whatever is said to him, but not as Ray does."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


def test_preflight_makes_nothing(tiny_config: Config, tmp_path: Path) -> None:
    preflight(dataclasses.replace(tiny_config, runs_dir=str(tmp_path / "a" / "b")))
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match="no permission in"):
        check_writable(tmp_path / "runs")


def test_link_to_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="runs is not a folder"):
        check_writable(tmp_path / "runs")


@pytest.mark.parametrize("address", ["somewhere", ":6379", "host:", "host:70000", "ray://host"])
def test_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=f"launcher.address={address}: expected host:port"):
        check_ray(RayLauncherConfig(address=address))


def test_somebody_else_at_the_address_is_refused(web_server: int) -> None:
    with pytest.raises(ConfigError, match=f"127.0.0.1:{web_server}: what answers there is no Ray"):
        check_ray(RayLauncherConfig(address=f"127.0.0.1:{web_server}"))


@pytest.mark.parametrize("address", ["local", ""])
def test_local_ray_needs_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_ray(RayLauncherConfig())


def test_port_just_given_up_is_free() -> None:
    """Its last connection may still stand in TIME_WAIT."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        connection, _ = server.accept()
        with pytest.raises(ConfigError, match=f"launcher.port={port}: cannot be used"):
            check_ray(RayLauncherConfig(port=port))
        connection.close()  # this side first, so that it is the one that waits
        client.close()
    check_ray(RayLauncherConfig(port=port))


def test_missing_critic_leaves_no_run_folder(tiny_config: Config) -> None:
    tiny_config.model.critic_path = "no/critic"
    with pytest.raises(ConfigError, match="no/critic is not a Hugging Face model folder"):
        run.launch(tiny_config, Console())
    assert not (Path(tiny_config.runs_dir) / tiny_config.name).exists()


def test_stages_that_do_not_start_leave_no_run_folder(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("no stages today")

    monkeypatch.setattr(run, "build_stages", fail)
    with pytest.raises(ConfigError, match="no stages today"):
        run.launch(tiny_config, Console())
    assert not (Path(tiny_config.runs_dir) / tiny_config.name).exists()
