"""From a checked config to a finished run: base model, stages, run folder, control loop."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vapo_async.build import BaseModel, build_heldout, ensure_base
from vapo_async.checkpoint import find_resume, newest_whole
from vapo_async.config import Config, ConfigError, InlineLauncherConfig, RayLauncherConfig, RunError
from vapo_async.launcher.inline import InlineStages
from vapo_async.launcher.preflight import preflight, unwritable
from vapo_async.launcher.schedule import SCHEDULE_FILE
from vapo_async.metrics.console import Console
from vapo_async.metrics.loggers import check_loggers
from vapo_async.metrics.summary import Summary
from vapo_async.models.load import check_loadable, check_model_folder, load_tokenizer
from vapo_async.pipeline import DISK_ERRORS, train
from vapo_async.prompts.tasks import Task, build_task
from vapo_async.stages import Stages

_LOCK = ".lock"  # in a run's folder


def launch(config: Config, console: Console, overrides: Sequence[str] = ()) -> tuple[Summary, Path]:
    """Trains; returns the summary and the run's folder.

    Raises:
        ConfigError: something that the user can mend.
        RunError: a stage failed or the disk is full.
    """
    preflight(config)
    check_loggers(config.logging)
    task = build_task(config.task, config.seed)
    base = ensure_base(config, console.note)
    check_base(config, base, task)
    if task.overlap_removed:
        console.note(f"left out {task.overlap_removed} training problems that are held-out ones too")
    resumed = find_resume(config.resume, Path(config.runs_dir), config.name, console.note)
    with ExitStack() as held:
        if resumed is not None:
            held.enter_context(exclusive(resumed))
            _check_replay(config, resumed)
        checkpoint = None if resumed is None else newest_whole(resumed, console.note)
        console.note("starting the stages")
        stages = build_stages(config, base, console.note)
        logs = None
        try:  # the folder comes last: what fails before leaves none behind
            run_dir = resumed or _new_run_dir(Path(config.runs_dir), config.name)
            if resumed is None:
                held.enter_context(exclusive(run_dir))
            logs = run_dir / "logs"
            console.note(f"run folder: {run_dir}")
            if isinstance(stages, InlineStages):
                stages.record(run_dir / SCHEDULE_FILE)
            return train(config, stages, run_dir, console, resumed=checkpoint, overrides=overrides), run_dir
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise RunError(f"the run folder cannot be written to: {error.strerror}; make room, resume=auto") from error
        finally:
            stages.shutdown(logs)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Holds a run's folder for this process; the system lets go of it when the process ends, however it does.

    Raises:
        ConfigError: another process has it.
    """
    with (run_dir / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{run_dir} is in use by another process: wait for its end, or stop it") from error
        yield


def _check_replay(config: Config, run_dir: Path) -> None:
    """A resumed run cuts its own schedule and writes it anew: it cannot be what is replayed."""
    replay = config.launcher.replay if isinstance(config.launcher, InlineLauncherConfig) else None
    if replay is not None and Path(replay).resolve() == (run_dir / SCHEDULE_FILE).resolve():
        raise ConfigError(f"launcher.replay={replay} is the schedule of the run that goes on: give a copy of it")


def check_base(config: Config, base: BaseModel, task: Task) -> None:
    """Tokenizer, model configuration and prompts fit together: mistakes show here, not in some stage's process."""
    build_heldout(config, task, load_tokenizer(base.tokenizer), config.task.heldout_problems)
    check_loadable(base.model)
    if config.model.critic_path is not None:
        check_loadable(check_model_folder(Path(config.model.critic_path)))


def build_stages(config: Config, base: BaseModel, note: Callable[[str], None]) -> Stages:
    """The stages where ``launcher=`` puts them; ``note`` is told what is worth a line."""
    match config.launcher:
        case InlineLauncherConfig():
            return InlineStages(config, base)
        case RayLauncherConfig() as launcher:
            from vapo_async.launcher.ray_stages import RayStages  # importing ray takes a second

            return RayStages(config, launcher, base, note)
    raise TypeError(f"no launcher for {type(config.launcher).__name__}")


def _new_run_dir(runs_dir: Path, name: str) -> Path:
    """``runs_dir/name/<time>``; a second run in one second gets a suffix."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        for attempt in range(1000):
            run_dir = runs_dir / name / (stamp if attempt == 0 else f"{stamp}_{attempt}")
            try:
                run_dir.mkdir(parents=True)
            except FileExistsError:
                if not run_dir.is_dir():
                    raise
                continue
            if not os.access(run_dir, os.W_OK):
                raise PermissionError(13, "Permission denied")
            return run_dir
    except OSError as error:
        raise unwritable(runs_dir, error.strerror or str(error)) from error
    raise ConfigError(f"runs_dir={runs_dir}: a thousand runs named {name} in one second; choose another name")
