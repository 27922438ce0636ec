"""Scalars of a run, step by step, to every logger that the configuration asks for.

Two things are always written into the run's folder:

- ``metrics.jsonl``: one row per call of :meth:`MetricsLog.log` with all its scalars; :func:`read_metrics` merges rows
  of one step. The report, the plots and people with pandas read this one.
- ``csv/scalars/<name>.csv`` by TorchRL's ``CSVLogger``: one file per scalar without a header, ``step,value``: handy to
  ``tail -f`` and what TorchRL's own tools expect, but clumsy where several scalars of a step belong together.

Steps count policy updates: 0 is the base policy, 1 … N the updates. Value pretraining comes before: its V batches are
steps 1 − V … 0. TorchRL's loggers get ``step + V`` instead, a count of batches, because W&B takes no negative step.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torchrl.record.loggers.common import Logger
from torchrl.record.loggers.csv import CSVLogger

from vapo_async.config import ConfigError, LoggingConfig
from vapo_async.metrics import names
from vapo_async.metrics.jsonl import JsonLines, read_json_lines

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """A multiplexer over ``metrics.jsonl`` and TorchRL's loggers."""

    def __init__(self, run_dir: Path, loggers: list[Logger], value_pretraining_steps: int = 0) -> None:
        self.path = run_dir / METRICS_FILE
        self._loggers = loggers
        self._offset = value_pretraining_steps
        self._file = JsonLines(self.path)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one row. NaN and infinities become null in ``metrics.jsonl``; the others get them as they are."""
        floats = {name: float(value) for name, value in scalars.items()}
        row = {name: value if math.isfinite(value) else None for name, value in floats.items()}
        self._file.write({"step": step, **row})
        for logger in self._loggers:
            logger.log_metrics(floats, step=step + self._offset)

    def close(self) -> None:
        """Flushes and ends the file and every logger."""
        self._file.close()
        for logger in self._loggers:
            logger.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def build_logger(config: LoggingConfig, run_dir: Path, name: str, value_pretraining_steps: int = 0) -> MetricsLog:
    """The loggers of a run; appends where the folder holds metrics already (a resumed run).

    Args:
        config: which loggers beside the two files.
        run_dir: the run's folder.
        name: how W&B and Trackio call the run.
        value_pretraining_steps: V, see the module's docstring.
    """
    check_loggers(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = [CSVLogger(exp_name="csv", log_dir=str(run_dir))]
    if config.tensorboard:
        from torchrl.record.loggers.tensorboard import TensorboardLogger

        loggers.append(TensorboardLogger(exp_name="tensorboard", log_dir=str(run_dir)))
    if config.wandb:
        from torchrl.record.loggers.wandb import WandbLogger

        loggers.append(WandbLogger(exp_name=name, project=config.project, save_dir=str(run_dir)))
    if config.trackio:
        from torchrl.record.loggers.trackio import TrackioLogger

        loggers.append(TrackioLogger(exp_name=name, project=config.project))
    return MetricsLog(run_dir, loggers, value_pretraining_steps)


def check_loggers(config: LoggingConfig) -> None:
    """Raises :class:`ConfigError` for a logger whose package is not installed; cheap, for the start of a run."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb, "trackio": config.trackio}
    for package, on in wanted.items():
        if on and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"logging.{package}=true needs the package '{package}', which is not installed: "
                f"pip install 'vapo-async[{package}]' (or logging.{package}=false)"
            )


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The rows of ``metrics.jsonl`` by step.

    Rows of one step are merged, the later one wins. A resumed run repeats versions: the policy steps that it undid are
    left out. So is a last line that was cut by a kill; null is NaN.
    """
    merged: dict[int, dict[str, float]] = {}
    version = -math.inf
    for row in read_json_lines(run_dir / METRICS_FILE):
        if (at := row.get(names.VERSION)) is not None:
            if at <= version:
                merged = {step: old for step, old in merged.items() if step < max(1, row["step"])}
            version = at
        floats = {name: math.nan if value is None else value for name, value in row.items()}
        merged.setdefault(row["step"], {}).update(floats)
    return [merged[step] for step in sorted(merged)]
