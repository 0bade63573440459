"""Finished parts of measurements, kept by hash: what is known is not measured again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.files import disk_errors


class Kept:
    """JSON objects under keys, in a file of JSON Lines that only grows.

    A part is one line, so that a run which is interrupted loses the part it was at and no other;
    a line that is not whole counts as not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = dict(_whole_lines(path))

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under the key last, None where nothing was."""
        return self._values.get(key)

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Append the value; it has left the process when this returns."""
        line = json.dumps({"key": key, "value": value}, sort_keys=True, allow_nan=False)
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # begins anew after a line that was cut
        self._values[key] = value


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            match entry:
                case {"key": str(key), "value": dict(value)}:
                    yield key, value
