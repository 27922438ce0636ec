"""Evaluates a run, a checkpoint or a model: ``python scripts/evaluate.py FOLDER [key=value …]``; see ``--help``."""

import json
import os
import sys
import time
from pathlib import Path

from vapo_async.config import ConfigError, RunError

USAGE = """\
usage: python scripts/evaluate.py FOLDER [--json FILE] [group=choice …] [section.key=value …]

Measures a model on a task's held-out problems: avg@k with its standard error (clustered over problems), pass@k, greedy
accuracy, lengths and speed. FOLDER is one of
  runs/train/2026-01-31_12-00-00                     a run: its newest whole checkpoint
  runs/train/.../checkpoints/step_000030             a checkpoint, or the policy/ folder in it
  path/to/model                                      any Hugging Face folder, or a hub name org/name
or is left out for the model that model=… or experiment=… says, for example model=embedded: the base.

A run's model is evaluated with the run's own settings, any other with those of configs/. Settings given here win:
  python scripts/evaluate.py runs/train/2026-01-31_12-00-00 evaluation.samples=16 evaluation.problems=64
  python scripts/evaluate.py path/to/model task=math engine.max_slots=16 evaluation.samples=1
  evaluation.problems, .samples, .temperature, .top_p    what is asked, how often (k), how
  task=…, task.max_response_tokens, …                    which problems, with what limits
  engine.max_slots, learner.threads, model.dtype         responses decoded together, torch threads, precision
python scripts/train_async.py --help lists all of them.

  --json FILE   writes the numbers and the configuration there, too
"""


def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 1 failed, 2 a mistake in what was asked for, 130 interrupted."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE, end="")
        return 0
    try:
        folder, overrides, json_path = _split(arguments)
        from vapo_async.evaluation import evaluate_model, evaluation_config

        config, source = evaluation_config(folder, overrides, lambda text: print(text, file=sys.stderr))
        print(f"settings: {source or 'configs/'}{', ' if overrides else ''}{' '.join(overrides)}")
        line = _Line()
        result = evaluate_model(config, line.note, line.show)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    line.note("")
    width = max(len(label) for label, _ in result.rows())
    print("\n".join(f"{label:<{width}}  {value}" for label, value in result.rows()))
    if json_path is not None:
        json_path.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
        print(f"{'written to':<{width}}  {json_path}")
    return 0


def _split(arguments: list[str]) -> tuple[str | None, list[str], Path | None]:
    """Folder, overrides, file of ``--json``."""
    folder, overrides, json_path = None, [], None
    rest = iter(arguments)
    for argument in rest:
        if argument == "--json" or argument.startswith("--json="):
            name = argument.removeprefix("--json=") if "=" in argument else next(rest, "")
            json_path = Path(name).expanduser()
            if not name or json_path.is_dir() or not os.access(json_path.absolute().parent, os.W_OK):
                raise ConfigError(f"--json needs a file in a folder that can be written, found '{name}'")
        elif argument.startswith("-") or ("=" in argument and not Path(argument).exists()):
            overrides.append(argument)
        elif folder is not None:
            raise ConfigError(f"one FOLDER at a time: found {folder} and {argument} (settings are key=value)")
        else:
            folder = argument
    return folder, overrides, json_path


class _Line:
    """Progress in place on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._tty = sys.stdout.isatty()
        self._next_s = 0.0 if self._tty else time.monotonic() + 5.0

    def show(self, text: str) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + (0.2 if self._tty else 5.0)
            print(f"\r{text}\x1b[K" if self._tty else text, end="" if self._tty else "\n", flush=True)

    def note(self, text: str) -> None:
        print(f"\r{text}\x1b[K" if self._tty else text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
