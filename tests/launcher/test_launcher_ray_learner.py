"""A rank of the learner, in this process."""

import socket
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from vapo_async.build import BaseModel
from vapo_async.config import Config
from vapo_async.launcher.ray_learner import LearnerActor


def test_the_port_of_a_meeting_point_is_kept_from_others_and_torch_can_listen_there(
    tiny_config: Config, base_folder: Path
) -> None:
    learner = LearnerActor(tiny_config, BaseModel(base_folder, base_folder), 0)
    host, port = learner.meeting_point()
    with closing(socket.socket()) as other, pytest.raises(OSError, match="in use"):
        other.bind((host, port))
    limit = timedelta(seconds=10)
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=limit)
    store.set("a", "b")
    assert TCPStore(host, port, wait_for_workers=False, timeout=limit).get("a") == b"b"
    _, later = learner.meeting_point()
    assert later != port
    del store


def test_the_port_of_the_meeting_point_before_is_given_up(tiny_config: Config, base_folder: Path) -> None:
    learner = LearnerActor(tiny_config, BaseModel(base_folder, base_folder), 0)
    host, port = learner.meeting_point()
    learner.meeting_point()
    with closing(socket.socket()) as other:
        other.bind((host, port))
