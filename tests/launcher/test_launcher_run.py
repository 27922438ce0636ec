"""A run's folder belongs to one process at a time; what cannot go on is refused before anything is touched."""

import dataclasses
from pathlib import Path

import pytest

from vapo_async.config import Config, ConfigError, InlineLauncherConfig
from vapo_async.launcher.run import exclusive, launch
from vapo_async.launcher.schedule import SCHEDULE_FILE
from vapo_async.metrics.console import Console


def test_a_run_folder_has_one_owner(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(ConfigError, match="is in use by another process"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_two_processes_do_not_go_on_with_one_run(tiny_config: Config) -> None:
    _, run_dir = launch(dataclasses.replace(tiny_config, steps=1), Console())
    again = dataclasses.replace(tiny_config, resume=str(run_dir))
    with exclusive(run_dir), pytest.raises(ConfigError, match="is in use by another process"):
        launch(again, Console())
    replay = InlineLauncherConfig(replay=str(run_dir / SCHEDULE_FILE))
    with pytest.raises(ConfigError, match="is the schedule of the run that goes on: give a copy"):
        launch(dataclasses.replace(again, steps=1, launcher=replay), Console())
    assert launch(dataclasses.replace(again, steps=2), Console())[0].versions == 3
