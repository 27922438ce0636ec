"""What every benchmark does alike: its command line, and a line on what its numbers depend on."""

import argparse
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch


def command_line(doc: str | None, *, quick: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--json`` and, unless ``quick`` is False, ``--quick``; ``doc`` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    if quick:
        parser.add_argument("--quick", action="store_true", help="a minimal setting, to see whether it runs")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options; a file that cannot be written is told before anything is measured."""
    options = parser.parse_args(arguments)
    for name in ("json", "png"):
        path = getattr(options, name, None)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name}: no folder {path.parent}")
    return options


def environment(**more: object) -> dict[str, object]:
    """Versions and machine; ``more`` comes after them."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **more,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def print_bounds(found: Iterable[tuple[str, bool]]) -> None:
    """What is demanded, and whether it holds."""
    for text, holds in found:
        print(f"{'holds' if holds else 'FAILS':<6} {text}")


def announce(found: dict[str, object]) -> None:
    """Prints the line."""
    print(" · ".join(f"{key} {value}" for key, value in found.items()), flush=True)
