"""A learner that does not start is told at once, with where its log is."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import tiny_overrides

from vapo_async.config import RayLauncherConfig
from vapo_async.config.load import load_config
from vapo_async.launcher import ray_start
from vapo_async.launcher.ray_stages import RayStages
from vapo_async.stages import StageDiedError

pytestmark = pytest.mark.ray


def test_a_learner_that_dies_before_its_ranks_meet_is_told_with_its_log(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actors travel by value and import nothing large, so that this takes seconds."""

    class Idle:
        def __init__(self, *_: object) -> None:
            pass

        def ping(self) -> None:
            pass

    class Dying(Idle):
        """Its process ends as one that the system kills."""

        def meeting_point(self) -> None:
            print("last words", flush=True)
            os._exit(1)

    for name in ("FlowActor", "VerifierActor", "EvaluatorActor", "RolloutActor"):
        monkeypatch.setattr(ray_start, name, Idle)
    monkeypatch.setattr(ray_start, "LearnerActor", Dying)
    more = ("launcher=ray", "learner=deepspeed", "learner.ranks=1")
    config = load_config([*tiny_overrides(base_folder, tmp_path), *more])
    assert isinstance(config.launcher, RayLauncherConfig)
    base: Any = None  # what it is an instance of would bring torch into each of them
    with pytest.raises(
        StageDiedError, match=r"^the run waited for the learner, whose process died \(.*; see /"
    ) as told:
        RayStages(config, config.launcher, base, print)
    assert not ray.is_initialized()
    message = str(told.value)
    assert "\n" not in message and "run folder" not in message
    (logs,) = re.findall(r"(?:see|in) (/\S+)", message)
    assert any("last words" in path.read_text() for path in Path(logs).glob("worker-*.out"))
