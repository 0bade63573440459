"""What a folder of outputs remembers: hashes, and what each file was made of.

It makes a second run quick and an interrupted one continue: a file whose size and time of change
are those remembered is not hashed again, and one made of the same is not made again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from convert.files import sha256_of
from convert.gguf_parts import part_paths
from quant_eval.results import write_json

MANIFEST = "manifest.json"
CHECKPOINT_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".md", ".model"})
FORMAT = 1


class Manifest:
    """The memory of one output folder; every change is on the disk when a method returns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = _read(folder / MANIFEST)
        usable = data.get("format") == FORMAT
        self._hashes: dict[str, dict[str, Any]] = data["hashes"] if usable else {}
        self._outputs: dict[str, dict[str, Any]] = data["outputs"] if usable else {}

    def checkpoint_sha256(self, checkpoint: Path) -> str:
        """One hash of all files that a conversion reads."""
        files = [file for file in checkpoint.iterdir() if file.suffix in CHECKPOINT_SUFFIXES]
        return self._hash_of_files(checkpoint, files)

    def model_sha256(self, checkpoint: Path) -> str:
        """The same without the model card, which no result depends on."""
        files = [
            file
            for file in checkpoint.iterdir()
            if file.suffix in CHECKPOINT_SUFFIXES and file.suffix != ".md"
        ]
        return self._hash_of_files(checkpoint, files)

    def sha256_of(self, path: Path) -> str:
        """A file's SHA-256; that of a folder, or of several parts, is of their names and hashes."""
        if path.is_dir():
            return self._hash_of_files(path, [file for file in path.rglob("*") if file.is_file()])
        parts = part_paths(path)
        return self._hash(path) if len(parts) == 1 else self._hash_of_files(path.parent, parts)

    def origin_of(self, path: Path) -> str | None:
        """What an output was made of, None where that is not known or it was changed since."""
        entry = self._outputs.get(path.name)
        if entry is None or entry["sha256"] != self.sha256_of(path):
            return None
        return str(entry["origin"])

    def record(self, path: Path, origin: str) -> None:
        """Remember what an output was made of."""
        self._outputs[path.name] = {
            "origin": origin,
            "sha256": self.sha256_of(path),
            "checked": False,
        }
        self._save()

    def is_checked(self, path: Path) -> bool:
        """Whether the output was loaded and spoke."""
        return bool(self._outputs[path.name]["checked"])

    def record_check(self, path: Path) -> None:
        """Remember that the output was loaded and spoke."""
        self._outputs[path.name]["checked"] = True
        self._save()

    def _hash_of_files(self, folder: Path, files: list[Path]) -> str:
        names = sorted(file.relative_to(folder).as_posix() for file in files)
        return digest({name: self._hash(folder / name) for name in names})

    def _hash(self, file: Path) -> str:
        path, own = file.resolve(), self.folder.resolve()
        name = (path.relative_to(own) if path.is_relative_to(own) else path).as_posix()
        status = file.stat()
        seen = {"nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        known = self._hashes.get(name, {})
        if {key: known.get(key) for key in seen} == seen:
            return str(known["sha256"])
        sha256 = sha256_of(file)
        self._hashes[name] = {**seen, "sha256": sha256}
        self._save()
        return sha256

    def _save(self) -> None:
        write_json(
            self.folder / MANIFEST,
            {"format": FORMAT, "hashes": self._hashes, "outputs": self._outputs},
        )


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON's types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where none can be read: what is forgotten is done again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
