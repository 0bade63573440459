"""A GGUF model in one file or in the parts that llama.cpp splits it into."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.errors import GgufError
from convert.gguf_header import GgufHeader, GgufTensor, MetadataValue, read_header

MAX_PARTS = 1 << 16
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_WHAT_TO_DO = "fetch or make all parts again"


@dataclass(frozen=True, slots=True)
class GgufPart:
    """One file and its checked header."""

    path: Path
    header: GgufHeader


@dataclass(frozen=True, slots=True)
class GgufModel:
    """All parts in their order; a model that is not split has one.

    Its metadata are those of the first part.
    """

    parts: tuple[GgufPart, ...]

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def metadata(self) -> dict[str, MetadataValue]:
        return self.parts[0].header.metadata

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        """In the order of the file; names are unique over all parts."""
        return {name: tensor for part in self.parts for name, tensor in part.header.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(part.header.file_nbytes for part in self.parts)


def part_name(stem: str, number: int, count: int) -> str:
    """The name that llama.cpp looks for; number counts from 1."""
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def part_paths(path: Path) -> list[Path]:
    """The files of a model by their names alone: all that are there where the first is given."""
    named = _PART_NAME.fullmatch(path.name)
    if named is None or int(named["number"]) != 1:
        return [path]
    paths = _siblings(path, named["stem"], int(named["count"]))
    return [path, *(one for one in paths[1:] if one.is_file())]


def read_model(path: Path) -> GgufModel:
    """Read and check the header of a file, and of its other parts where it is the first of several.

    Raises GgufError for a part that is missing, is another model's or is not the first.
    """
    header = read_header(path)
    count = _whole_number(header, "split.count", path, default=1)
    if count <= 1:
        return GgufModel((GgufPart(path, header),))
    named = _PART_NAME.fullmatch(path.name)
    number = _whole_number(header, "split.no", path, default=0) + 1
    if named is None or (int(named["number"]), int(named["count"])) != (number, count):
        raise GgufError(
            f"{path}: says it is part {number} of {count} and llama.cpp looks for parts by name; "
            f"name it {part_name('MODEL', number, count)}"
        )
    paths = _siblings(path, named["stem"], count)
    if number != 1:
        raise GgufError(f"{path}: is part {number} of {count}; give the first, {paths[0].name}")
    missing = next((one for one in paths if not one.is_file()), None)
    if missing is not None:
        raise GgufError(f"{missing}: the part is missing, one of {count}; {_WHAT_TO_DO}")
    return read_parts(paths)


def read_parts(paths: Sequence[Path]) -> GgufModel:
    """Read and check the headers of all parts, given in their order under any names.

    Raises GgufError where numbers, counts or tensors contradict each other.
    """
    model = GgufModel(tuple(GgufPart(path, read_header(path)) for path in paths))
    if len(paths) == 1:
        return model
    seen: set[str] = set()
    for number, part in enumerate(model.parts):
        said_number = _whole_number(part.header, "split.no", part.path, default=-1)
        said_count = _whole_number(part.header, "split.count", part.path, default=-1)
        if (said_number, said_count) != (number, len(paths)):
            raise GgufError(
                f"{part.path}: says it is part {said_number + 1} of {said_count} and stands as "
                f"part {number + 1} of {len(paths)}; {_WHAT_TO_DO}"
            )
        twice = next((name for name in part.header.tensors if name in seen), None)
        if twice is not None:
            raise GgufError(f"{part.path}: {twice} is in an earlier part too; {_WHAT_TO_DO}")
        seen |= part.header.tensors.keys()
    n_tensors = _whole_number(model.parts[0].header, "split.tensors.count", paths[0], default=-1)
    if n_tensors != len(seen):
        raise GgufError(
            f"{paths[0]}: announces {n_tensors} tensors and the parts hold {len(seen)}; "
            f"{_WHAT_TO_DO}"
        )
    return model


def _siblings(path: Path, stem: str, count: int) -> list[Path]:
    return [path.with_name(part_name(stem, i + 1, count)) for i in range(count)]


def _whole_number(header: GgufHeader, key: str, path: Path, *, default: int) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or not -1 <= value <= MAX_PARTS:
        raise GgufError(f"{path}: {key} is {str(value)[:40]}, not a count; {_WHAT_TO_DO}")
    return value
