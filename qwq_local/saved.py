"""Sessions on disk: a line of JSON, and after it the kv_cache if it was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from convert.errors import QwqError
from convert.files import replacing_file
from qwq_local.rope import Yarn

FORMAT = 2
MAX_TEXT_NBYTES = 1 << 28
_ENDS_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """fields: all but the kv_cache. bound_to: what must be the same for it to be loaded."""

    fields: Mapping[str, Any]
    bound_to: Mapping[str, Any]
    state: bytes = b""


@dataclass(frozen=True, slots=True)
class Cached:
    """What a kv_cache was read from, and with which rope."""

    ids: list[int]
    rope: Yarn | None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of asdict."""
        rope = fields["rope"]
        return cls(fields["ids"], None if rope is None else Yarn(**rope))


def write_saved(path: Path, saved: Saved, *, force: bool) -> None:
    """Write it whole or not at all. Raises OutputExistsError unless force."""
    body = json.dumps(saved.fields, ensure_ascii=False)
    head = {
        "format": FORMAT,
        "bound_to": saved.bound_to,
        "state_nbytes": len(saved.state),
        "sha256": _digest(body.encode(), saved.state),
        "fields": body,
    }
    with replacing_file(path, force=force) as file:
        file.write(json.dumps(head).encode() + b"\n" + saved.state)


def read_saved(path: Path, bound_to: Mapping[str, Any]) -> Saved:
    """Read and verify. Raises QwqError where the file is damaged, or of another model."""
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_TEXT_NBYTES)
            head = json.loads(line)
            body, nbytes = head["fields"], head["state_nbytes"]
            if head["format"] != FORMAT:
                raise QwqError(
                    f"{path}: is of format {head['format']!r} and {FORMAT} can be read; save it "
                    "again with the program that wrote it"
                )
            state = file.read()
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise QwqError(f"{path}: is no saved session ({error}); give one") from error
    if len(state) != nbytes or _digest(str(body).encode(), state) != head["sha256"]:
        raise QwqError(
            f"{path}: is damaged, its hash or its length ({len(state):,} bytes of {nbytes:,}) is "
            "another than was written; restore it from a copy"
        )
    for name, expected in bound_to.items():
        if head["bound_to"].get(name) != expected:
            raise QwqError(
                f"{path}: was saved with another {name} ({head['bound_to'].get(name)}, here "
                f"{expected}); open the model that it was saved with"
            )
    return Saved(json.loads(body), head["bound_to"], state)


def identify(path: Path | str) -> str:
    """A hash by which a model is told from others: its names, sizes and first and last bytes.

    The first bytes of a GGUF file hold its header, with the hashes of its tensors where we made it.
    """
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    for file_path in files:
        if not file_path.is_file() or file_path.suffix not in (".gguf", ".json", ".safetensors"):
            continue
        nbytes = file_path.stat().st_size
        digest.update(f"{nbytes}\n".encode())
        with file_path.open("rb") as file:
            digest.update(file.read(16 * _ENDS_NBYTES))
            file.seek(max(0, nbytes - _ENDS_NBYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
