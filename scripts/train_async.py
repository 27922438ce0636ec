"""Trains a reasoning model by asynchronous VAPO: ``python scripts/train_async.py [key=value …]``; see ``--help``."""

import sys

from vapo_async.config import ConfigError, RunError


def main(arguments: list[str]) -> int:
    """Exit code: 0 finished, 1 failed, 2 a mistake in what was asked for, 130 interrupted (resume=auto goes on)."""
    from vapo_async.config.load import help_text
    from vapo_async.config.unread import unread_notes
    from vapo_async.launcher.preflight import configure, preflight

    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text())
        return 0
    try:
        notes: list[str] = []
        config, changes = configure(arguments, notes.append)
        preflight(config)  # now, because the next line imports torch and takes seconds
        from vapo_async.launcher.run import launch
        from vapo_async.metrics.console import Console

        with Console() as console:
            for line in notes:
                console.note(line)
            for change in changes:
                console.note(f"changed for the rest of the run: {change}")
            for line in unread_notes(config, arguments):
                console.note(line)
            summary, _ = launch(config, console, arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("left at once; resume=auto goes on from the run's last checkpoint", file=sys.stderr)
        return 130
    return 130 if summary.status == "interrupted" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
