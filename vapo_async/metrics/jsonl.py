"""Files of one JSON object per line that a kill may cut at any byte and a resumed run goes on to write."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends rows without a buffer: another process sees each at once, and a kill costs the last one at most."""

    def __init__(self, path: Path) -> None:
        _end_last_line(path)
        self.path = path
        self._file = path.open("ab", buffering=0)  # a full disk fails the write that meets it, and no later close

    def write(self, row: Mapping[str, Any]) -> None:
        """One line.

        Raises:
            ValueError: a number is not finite, which JSON does not have.
            OSError: the disk is full; the line may be cut.
        """
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in the order of the file; lines that were cut by a kill are left out.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: is it a run's folder?")
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _end_last_line(path: Path) -> None:
    """After a kill the file may end in half a row, which the next one must not be glued to."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
