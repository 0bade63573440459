"""The key that other machines need to be let in."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from qwq_local import QwqError

VARIABLE = "QWQ_API_KEY"


def key_file(environment: Mapping[str, str]) -> Path:
    """Where the key is kept: in the user's configuration folder."""
    base = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "qwq-local" / "api-key"


def find_key(path: Path, environment: Mapping[str, str]) -> tuple[str, bool]:
    """The key of the environment or of the file, and whether it was made just now.

    Raises QwqError where others may read the file, or it holds no key.
    """
    if VARIABLE in environment:
        return _checked(environment[VARIABLE], VARIABLE), False
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        key = f"qwq-{secrets.token_urlsafe(32)}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key + "\n")
        return key, True
    mode = path.stat().st_mode & 0o777
    if os.name == "posix" and mode & 0o077:
        raise QwqError(f"{path}: its mode is {mode:o} and must be 600; chmod 600 it, or delete it")
    return _checked(path.read_text(encoding="utf-8"), str(path)), False


def _checked(key: str, where: str) -> str:
    key = key.strip()
    if len(key) < 16 or not key.isascii() or not key.isprintable():
        raise QwqError(f"{where}: the key has {len(key)} characters; use 16 or more, plain ASCII")
    return key
