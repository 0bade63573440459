"""Work that goes layer by layer: what is finished is kept, and continued after an interruption.

The hidden states of all batches lie in a file, so that only one batch is in memory; the system
keeps the file's pages there for as long as they fit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.calibration import TokenBatch
from convert.errors import OutputExistsError, QwqError
from convert.files import (
    disk_errors,
    finish_folder,
    partial_path,
    refuse_existing,
    remove,
    replacing_file,
    sole_writer,
    sync_file,
)

if TYPE_CHECKING:
    import torch

JOURNAL = "journal.json"


class LayerWork:
    """A folder while it is filled: layers finished, and what is to be remembered of them.

    n_done: layers that need no more work. notes: JSON values, kept with each finished layer.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any]) -> None:
        self.folder = folder
        self.n_done = 0
        self.notes: dict[str, Any] = {}
        self._made_of = dict(made_of)

    @property
    def _journal(self) -> Path:
        return self.folder / JOURNAL

    def states_path(self, n_layers: int) -> Path:
        """Where the hidden states after n_layers layers lie."""
        return self.folder / f"states-{n_layers:03}.f32"

    def finish_layer(self, *files: Path) -> None:
        """Note that one more layer is done, once its files are on the disk."""
        for path in files:
            sync_file(path)
        self.n_done += 1
        journal = {"made_of": self._made_of, "n_done": self.n_done, "notes": self.notes}
        with replacing_file(self._journal, force=True) as file:
            file.write(json.dumps(journal, indent=2, sort_keys=True).encode())
        remove(self.states_path(self.n_done - 1))

    def take_up(self, *, force: bool) -> None:
        """Continue from the journal where one of the same work is there; else begin anew.

        Raises OutputExistsError for other unfinished work, unless forced.
        """
        found = self._read_journal()
        if found is not None and found["made_of"] == self._made_of:
            self.n_done, self.notes = found["n_done"], found["notes"]
            return
        if found is not None and not force:
            raise OutputExistsError(
                f"{self.folder}: holds {found['n_done']} finished layers of a run with other input "
                "or settings; repeat that command, or give --force to discard them"
            )
        remove(self.folder)
        self.folder.mkdir(parents=True)

    def publish(self, path: Path) -> None:
        """Give the folder its name; the journal goes last, so that nothing is ever done twice."""
        for states in self.folder.glob("states-*.f32"):
            states.unlink()
        finish_folder(self.folder, path)
        (path / JOURNAL).unlink()

    def _read_journal(self) -> dict[str, Any] | None:
        """The journal; None where there is none that was written whole."""
        try:
            journal: dict[str, Any] = json.loads(self._journal.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return journal


@contextmanager
def layer_work(path: Path, made_of: Mapping[str, Any], *, force: bool) -> Iterator[LayerWork]:
    """Fill `<path>.partial` layer by layer and name it `path` when all is done.

    made_of: what decides the result, in JSON; unfinished work of the same is continued. On an error
    the finished layers stay in `<path>.partial`; with none finished nothing is left.
    Raises OutputExistsError where `path` exists and force is not given, and OutputBusyError.
    """
    refuse_existing(path, force=force)
    with _taken_up(path, made_of, force=force) as work:
        yield work
        work.publish(path)


@contextmanager
def passing_work(path: Path, made_of: Mapping[str, Any]) -> Iterator[LayerWork]:
    """The same where the caller keeps the result elsewhere: `<path>.partial` goes when all is done.

    Unfinished work of anything else is discarded.
    """
    with _taken_up(path, made_of, force=True) as work:
        yield work
        remove(work.folder)


@contextmanager
def _taken_up(path: Path, made_of: Mapping[str, Any], *, force: bool) -> Iterator[LayerWork]:
    work = LayerWork(partial_path(path), json.loads(json.dumps(dict(made_of))))
    with sole_writer(path), disk_errors(path):
        work.take_up(force=force)
        try:
            yield work
        except BaseException:
            if work.n_done == 0:
                remove(work.folder)
            raise


def write_states(path: Path, states: Iterable[torch.Tensor]) -> None:
    """Write the hidden states of all batches as they come, as float32, and wait for the disk."""
    import torch

    with path.open("wb") as file:
        for batch in states:
            batch.to("cpu", torch.float32).contiguous().numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())


def read_states(
    path: Path, batches: Sequence[TokenBatch], hidden_size: int
) -> Iterator[torch.Tensor]:
    """What write_states() wrote, a batch at a time: (n_sequences, n_positions, hidden_size)."""
    import torch

    with path.open("rb") as file:
        for batch in batches:
            shape = (*batch.ids.shape, hidden_size)
            values = np.fromfile(file, dtype=np.float32, count=math.prod(shape))
            if values.size != math.prod(shape):
                raise QwqError(f"{path}: ends early; remove {path.parent} and begin anew")
            yield torch.from_numpy(values.reshape(shape))
