"""What is checked before a run starts, and that a run which cannot start leaves no folder."""

import dataclasses
import importlib.util
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import tiny_overrides

from vapo_async.config import Config, ConfigError, RayLauncherConfig
from vapo_async.config.load import load_config
from vapo_async.launcher import run
from vapo_async.launcher.preflight import check_ray, check_readable_in_parts, check_writable, preflight
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


def in_parts(base: Path, runs_dir: Path, *more: str) -> Config:
    """All parameters in parts; ``more`` takes the place of what has the same key."""
    stage = ("launcher=ray", "learner=deepspeed", "learner.zero_stage=3")
    settings = [*tiny_overrides(base, runs_dir), *stage, *more]
    return load_config([f"{key}={value}" for key, value in dict(o.split("=", 1) for o in settings).items()])


def folder_of(path: Path, *files: str) -> Path:
    path.mkdir()
    for name in files:
        (path / name).touch()
    return path


OTHERS = ("config.json", "pytorch_model.bin", "tokenizer.safetensors")


@pytest.mark.parametrize("key", ["model.path", "model.critic_path"])
def test_a_model_without_safetensors_cannot_be_read_in_parts(key: str, base_folder: Path, tmp_path: Path) -> None:
    old = folder_of(tmp_path / "old", *OTHERS)
    with pytest.raises(ConfigError) as caught:
        check_readable_in_parts(in_parts(base_folder, tmp_path, f"{key}={old}"))
    assert str(caught.value) == (
        f"{key}={old}: no safetensors there (model.safetensors or model-*-of-*.safetensors), which "
        "learner.zero_stage=3 reads part by part; load the model and save it anew with save_pretrained, or use "
        "learner.zero_stage=2"
    )


@pytest.mark.parametrize(
    "more",
    [
        ["model.path={old}", "learner.zero_stage=2"],
        ["model.path={old}", "model.warm_start_steps=1"],  # the run makes its own folder of it
        ["model.path={old}/gone", "model.critic_path={old}/gone"],
        ["model.critic_path={old}", "algorithm.advantage=group", "algorithm.value_pretraining_steps=0"],
        ["model.path={whole}", "model.critic_path={parts}"],
    ],
)
def test_a_model_that_is_readable_in_parts_or_need_not_be_is_taken(
    more: list[str], base_folder: Path, tmp_path: Path
) -> None:
    old = folder_of(tmp_path / "old", *OTHERS)
    whole = folder_of(tmp_path / "whole", "model.safetensors")
    parts = folder_of(tmp_path / "parts", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    settings = (setting.format(old=old, whole=whole, parts=parts) for setting in more)
    check_readable_in_parts(in_parts(base_folder, tmp_path, *settings))


def test_a_model_that_the_run_makes_is_not_looked_for(base_folder: Path, tmp_path: Path) -> None:
    stage = ["launcher=ray", "learner=deepspeed", "learner.zero_stage=3"]
    check_readable_in_parts(load_config([*stage, "model=embedded", f"model.cache_dir={tmp_path}"]))


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_a_model_that_cannot_be_read_in_parts_is_told_before_anything_starts(base_folder: Path, tmp_path: Path) -> None:
    old = folder_of(tmp_path / "old", *OTHERS)
    config = in_parts(base_folder, tmp_path / "runs", f"model.path={old}")
    with pytest.raises(ConfigError, match=r"^model.path=.*: no safetensors there"):
        run.launch(config, Console())
    assert not (tmp_path / "runs").exists()
