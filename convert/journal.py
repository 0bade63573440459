"""What an unfinished output already holds, so that the same command continues where it was."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from convert.files import replacing_file
from convert.rounding_report import Choice, parse_choice
from convert.tensor_error import TensorError

MAX_NBYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Journal:
    """The state of one output; all of it is on the disk before the journal says so.

    identity: digest of everything that decides the output's bytes, but for the source's weights.
    n_slices: that are written, in reading order.
    source: SHA-256 of each shard that was read completely, then of the next one as far as it was.
    tensor_sha256: by GGUF name, of the complete tensors.
    error: of the tensor that is not complete, as far as it was written.
    choices: how the complete tensors were rounded, of those that were rounded with their Hessians.
    is_verified: read back and found whole; what is left to do is giving the final names.
    """

    identity: str
    n_slices: int = 0
    source: tuple[str, ...] = ()
    tensor_sha256: dict[str, str] = field(default_factory=dict)
    error: TensorError = field(default_factory=TensorError)
    choices: tuple[Choice, ...] = ()
    is_verified: bool = False

    def save(self, path: Path) -> None:
        with replacing_file(path, force=True) as file:
            file.write(json.dumps(asdict(self)).encode())


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".journal")


def load_journal(path: Path) -> Journal | None:
    """The journal at `path`, None where there is none or something else is in its place."""
    if not path.is_file() or path.stat().st_size > MAX_NBYTES:
        return None
    try:
        match json.loads(path.read_bytes()):
            case {
                "identity": str(identity),
                "n_slices": int(n_slices),
                "source": [*source],
                "tensor_sha256": dict(tensor_sha256),
                "error": dict(error),
                "is_verified": bool(is_verified),
            } as record:
                return Journal(
                    identity,
                    n_slices,
                    tuple(map(str, source)),
                    tensor_sha256,
                    TensorError(**error),
                    tuple(map(parse_choice, record.get("choices", ()))),
                    is_verified,
                )
            case _:
                return None
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
