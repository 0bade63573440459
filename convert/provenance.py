"""What a file says of where it comes from: keys that begin with `qwq.`, beside llama.cpp's own.

Digests of the source's shards and of the tensors are known after the last weight only. They have
a fixed length, so the header is planned with zeros in their place and filled in at the end.
"""

import re
import struct
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gguf

from convert.checkpoint import Checkpoint
from convert.imatrix import Imatrix

VERSION = "qwq.version"
RECIPE = "qwq.recipe"
FILE_TYPE = "qwq.file_type"
"""Equals general.file_type unless another tool changed the tensors and copied these keys."""
IMATRIX_SHA256 = "qwq.imatrix.sha256"
IMATRIX_DATASET = "quantize.imatrix.dataset"
"""Of qwq calibrate's files `qwq-local:` and the calibration set's digest."""
IMATRIX_N_ENTRIES = "quantize.imatrix.entries_count"
IMATRIX_N_CHUNKS = "quantize.imatrix.chunks_count"
ROUNDING = "qwq.rounding"
"""How codes were chosen where not each weight was rounded on its own."""
REPOSITORY = "qwq.source.repository"
REVISION = "qwq.source.revision"
SOURCE_FILES = "qwq.source.files"
SOURCE_SHA256 = "qwq.source.sha256"
"""SHA-256 of each of SOURCE_FILES."""
TENSOR_SHA256 = "qwq.tensor_sha256"
"""SHA-256 of each tensor's bytes, in the order of the tensors, over all parts of a split file."""

UNKNOWN_SHA256 = "0" * 64

_REVISION = re.compile(r"[0-9a-f]{40}")


class Origin(NamedTuple):
    """Where a checkpoint was fetched from, as far as the folder tells."""

    repository: str | None
    revision: str | None


def origin_of(folder: Path) -> Origin:
    """Read it off the hub's cache, or off what the hub's client left in a folder it filled."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # models--OWNER--NAME/snapshots/REVISION
        return Origin(
            folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
        )
    left_by_client = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    if left_by_client.is_file():
        first_line = left_by_client.read_bytes()[:40].decode("ascii", errors="replace")
        if _REVISION.fullmatch(first_line):
            return Origin(None, first_line)
    return Origin(None, None)


def add_provenance(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    *,
    recipe: str,
    file_type: int,
    imatrix: Imatrix | None,
    rounding: str,
    n_tensors: int,
) -> None:
    """Write the keys; all that is unknown is left out, all digests but the imatrix's are zeros."""
    origin = origin_of(checkpoint.path)
    shards = shard_paths(checkpoint)
    writer.add_string(VERSION, version("qwq-local"))
    writer.add_string(RECIPE, recipe)
    writer.add_uint32(FILE_TYPE, file_type)
    if imatrix is not None:
        _add_imatrix(writer, imatrix)
    writer.add_string(ROUNDING, rounding)  # the writer leaves empty ones out
    writer.add_string(REPOSITORY, origin.repository or "")
    writer.add_string(REVISION, origin.revision or "")
    writer.add_array(SOURCE_FILES, [shard.name for shard in shards])
    writer.add_array(SOURCE_SHA256, [UNKNOWN_SHA256] * len(shards))
    writer.add_array(TENSOR_SHA256, [UNKNOWN_SHA256] * n_tensors)


def _add_imatrix(writer: gguf.GGUFWriter, imatrix: Imatrix) -> None:
    """Which imatrix, and of which text.

    The keys of llama-quantize, but without paths, which say nothing on another machine.
    """
    names = [re.split(r"[\\/]", dataset)[-1] for dataset in imatrix.datasets]
    writer.add_string(IMATRIX_SHA256, imatrix.digest)
    writer.add_string(IMATRIX_DATASET, ", ".join(names).encode(errors="replace").decode())
    writer.add_uint32(IMATRIX_N_ENTRIES, len(imatrix.importance))
    if imatrix.n_chunks:
        writer.add_uint32(IMATRIX_N_CHUNKS, imatrix.n_chunks)


def shard_paths(checkpoint: Checkpoint) -> list[Path]:
    """The shards in the order in which they are read."""
    return sorted({info.path for info in checkpoint.tensors.values()})


def fill_digests(
    header: bytes, *, source_sha256: Sequence[str], tensor_sha256: Sequence[str]
) -> bytes:
    """A planned header with its zeros replaced; its length stays."""
    for key, digests in ((SOURCE_SHA256, source_sha256), (TENSOR_SHA256, tensor_sha256)):
        planned = _serialized_array(key, [UNKNOWN_SHA256] * len(digests))
        assert header.count(planned) == 1, key
        header = header.replace(planned, _serialized_array(key, digests))
    return header


def _serialized_array(key: str, texts: Sequence[str]) -> bytes:
    """A key with an array of strings, as GGUF has it."""
    kind = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, len(texts))
    return _serialized_text(key) + kind + b"".join(map(_serialized_text, texts))


def _serialized_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode("ascii")
