"""What can be seen without loading torch or Ray: run folder, resume, the model's files, Ray's address and port."""

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from vapo_async.checkpoint import find_resume
from vapo_async.collector.vllm_environment import check_vllm
from vapo_async.config import (
    Config,
    ConfigError,
    DeepSpeedLearnerConfig,
    FolderModelConfig,
    InlineLauncherConfig,
    RayLauncherConfig,
    VLLMEngineConfig,
)
from vapo_async.config.algorithm import AdvantageKind
from vapo_async.config.load import load_config
from vapo_async.config.saved import resumed_config
from vapo_async.launcher.schedule import Turn, replayed
from vapo_async.learner.deepspeed_environment import check_deepspeed

LOOPBACK = "127.0.0.1"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and an empty SETTINGS frame
_IN_PARTS = 3  # of ZeRO's stages
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
_WHERE = ("resume", "runs_dir", "name", "experiment")
START_RAY = "start one there with `ray start --head`, or unset it to get a local Ray"


def configure(overrides: Sequence[str], note: Callable[[str], None] = lambda _: None) -> tuple[Config, list[str]]:
    """The run's configuration, and what ``overrides`` change in that of a run that goes on (none for a new one).

    A resumed run keeps its own settings; ``experiment=`` only helps to find it. ``resume=auto`` becomes the run that
    was found, or ``never``; ``note`` is told of runs that were passed over.
    """
    where = load_config([o for o in overrides if o.partition("=")[0] in _WHERE])
    resumed = find_resume(where.resume, Path(where.runs_dir), where.name, note)
    if resumed is None:
        return replace(load_config(overrides), resume="never"), []
    config, changes = resumed_config(resumed, [o for o in overrides if not o.startswith("experiment=")])
    return replace(config, resume=str(resumed)), changes


def preflight(config: Config) -> None:
    """Looks where a run would write, go on from and connect to; leaves nothing behind.

    Raises:
        ConfigError: something that the user can mend.
    """
    check_trainable(config)
    if isinstance(config.learner, DeepSpeedLearnerConfig):
        check_deepspeed()
        check_readable_in_parts(config)
    if isinstance(config.engine, VLLMEngineConfig):
        check_vllm()
    resumed = find_resume(config.resume, Path(config.runs_dir), config.name)
    check_writable(Path(config.runs_dir))
    if resumed is not None and not os.access(resumed, os.W_OK | os.X_OK):
        raise ConfigError(f"resume={config.resume}: no permission to write in {resumed}; copy the run and resume that")
    if isinstance(config.launcher, RayLauncherConfig):
        check_ray(config.launcher)
    replayed_turns(config)


def check_trainable(config: Config) -> None:
    """Raises :class:`ConfigError` where the learner would lose small updates to rounding."""
    sharded = isinstance(config.learner, DeepSpeedLearnerConfig)
    if config.model.dtype not in (("float32", "bfloat16") if sharded else ("float32",)):
        raise ConfigError(
            f"model.dtype must be float32 for training, found '{config.model.dtype}': learner=torch keeps no fp32 "
            "master weights, so small updates would be rounded away; learner=deepspeed does, for bfloat16"
        )


def check_readable_in_parts(config: Config) -> None:
    """With ``learner.zero_stage=3`` each model is read tensor by tensor, which only safetensors can be.

    Folders that are not there, as yet or at all, and models that the run itself makes are left to who loads them.

    Raises:
        ConfigError: the folder of policy or critic has none.
    """
    learner, model = config.learner, config.model
    if not isinstance(learner, DeepSpeedLearnerConfig) or learner.zero_stage != _IN_PARTS:
        return
    given: dict[str, str | None] = {}
    if isinstance(model, FolderModelConfig) and model.warm_start_steps == 0:
        given["model.path"] = model.path
    if config.algorithm.advantage is AdvantageKind.gae:
        given["model.critic_path"] = model.critic_path
    for key, path in given.items():
        folder = Path(path or "").expanduser()
        if path is None or not folder.is_dir():
            continue
        if not any(file for pattern in _SAFETENSORS for file in folder.glob(pattern)):
            raise ConfigError(
                f"{key}={path}: no safetensors there ({' or '.join(_SAFETENSORS)}), which learner.zero_stage=3 reads "
                "part by part; load the model and save it anew with save_pretrained, or use learner.zero_stage=2"
            )


def replayed_turns(config: Config) -> list[Turn] | None:
    """The schedule that ``launcher.replay`` names, a turn for each version of the run; None without one."""
    launcher = config.launcher
    if not isinstance(launcher, InlineLauncherConfig) or launcher.replay is None:
        return None
    return replayed(Path(launcher.replay), config.algorithm.value_pretraining_steps + config.steps)


def check_writable(runs_dir: Path) -> None:
    """Run folders can be made in ``runs_dir``, which need not exist yet."""
    path = runs_dir.absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise unwritable(runs_dir, f"{path} is not a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise unwritable(runs_dir, f"no permission in {path}")


def unwritable(runs_dir: Path, reason: str) -> ConfigError:
    return ConfigError(f"runs_dir={runs_dir}: cannot write the run folder there ({reason}); choose another")


def ray_address(config: RayLauncherConfig) -> str | None:
    """The cluster to join; None: start a local Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


def ray_address_source(config: RayLauncherConfig) -> str:
    """Where :func:`ray_address` found it, as errors name it."""
    return "launcher.address" if config.address else "RAY_ADDRESS"


def check_ray(config: RayLauncherConfig) -> None:
    """Somebody answers at the cluster's address, or the local Ray's port is free."""
    address = ray_address(config)
    if address is not None:
        _check_answers(address, ray_address_source(config), config.connect_timeout_s)
    elif config.port is not None:
        _check_port_free(config.port)


def _check_answers(address: str, where: str, timeout_s: float) -> None:
    """Someone who speaks gRPC listens there. Ray itself would wait for minutes and then abort the process."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigError(f"{where}={address}: expected host:port, ray://host:port, 'auto' or 'local'")
    try:
        with closing(socket.create_connection((host, int(port)), timeout=timeout_s)) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(connection):
                raise ConfigError(f"{where}={address}: what answers there is no Ray; {START_RAY}")
    except OSError as error:
        raise ConfigError(
            f"{where}={address}: nobody answers there ({error.strerror or error}); {START_RAY}"
        ) from error


def _speaks_grpc(connection: socket.socket) -> bool:
    """An HTTP/2 server greets with a SETTINGS frame, type 4."""
    connection.sendall(_HTTP2_HELLO)
    head = connection.recv(4, socket.MSG_WAITALL)  # length (3 bytes), type
    return len(head) == 4 and head[3] == 4


def _check_port_free(port: int) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ConfigError(
                f"launcher.port={port}: cannot be used on {LOOPBACK} ({error.strerror}); "
                "choose another, or null for a free one"
            ) from error
