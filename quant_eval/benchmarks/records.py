"""Benchmark files as they are published -> records: JSON Lines, JSON, CSV, Parquet, folders."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.calibration import read_json_lines
from convert.errors import QwqError

MAX_FIELD = 1 << 28  # characters of a CSV field: tests of a problem may be long
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[tuple[Record, str]]:
    """The records of a file, or of all files below a folder, each with where it stands.

    Names of fields come in lower case with underscores. Raises QwqError for what is no benchmark.
    """
    for file in _files(path):
        for record, where in _READERS[file.suffix](file):
            if not isinstance(record, dict):
                raise QwqError(f"{where}: is {str(record)[:30]!r}, no record; mend or remove it")
            yield {str(key).strip().lower().replace(" ", "_"): record[key] for key in record}, where


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not found:
            raise QwqError(f"{path}: holds none of {', '.join(SUFFIXES)}; give a benchmark's file")
        return found
    if not path.is_file():
        raise QwqError(f"{path}: no such file or folder; check the path")
    if path.suffix not in SUFFIXES:
        raise QwqError(f"{path}: is none of {', '.join(SUFFIXES)}; give a benchmark's file")
    return [path]


def _read_json(path: Path) -> Iterator[tuple[object, str]]:
    """A list of records, one record, or records under `data`, `test` or the like."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise QwqError(f"{path}: no valid JSON ({error}); fetch it again") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        rows = [value for value in lists if value and isinstance(value[0], dict)]
        data = rows[0] if len(data) == len(rows) == 1 else [data]
    if not isinstance(data, list):
        raise QwqError(f"{path}: is no list of records; give a benchmark's file")
    for number, record in enumerate(data, start=1):
        yield record, f"{path}, record {number}"


def _read_csv(path: Path) -> Iterator[tuple[object, str]]:
    csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, record in enumerate(csv.DictReader(file, restval=""), start=1):
                record.pop(None, None)  # cells without a heading
                yield record, f"{path}, record {number}"
    except (csv.Error, UnicodeDecodeError) as error:
        raise QwqError(f"{path}: cannot be read as CSV ({error}); fetch it again") from error


def _read_parquet(path: Path) -> Iterator[tuple[object, str]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path}, record {number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise QwqError(f"{path}: cannot be read as Parquet ({error}); fetch it again") from error


_READERS = {
    ".jsonl": read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
