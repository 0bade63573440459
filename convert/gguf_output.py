"""One output on its way: its partial files, the hashes of its tensors, its journal."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from io import FileIO
from typing import Literal

from convert.encode import ByteArray, QuantType, row_nbytes
from convert.errors import NumericalError, StaleOutputError
from convert.files import disk_errors, partial_path, sync_folder
from convert.journal import Journal, journal_path, load_journal
from convert.plan import FilePlan, TensorPlan, aligned
from convert.provenance import fill_digests
from convert.read_back import Written
from convert.rounding_report import Choice
from convert.slice_encoder import Job, job_of
from convert.source_reader import Slice
from convert.tensor_error import TensorError


class GgufOutput:
    """Written slice by slice in reading order, each at its place; use begin() first.

    n_done: slices that are written, `source` what was read of the shards until there; choices: how
    complete tensors were rounded with Hessians; is_verified: read back and found whole. Nothing has
    a final name before publish(), and until forget() a new GgufOutput continues where this was.
    """

    def __init__(self, plan: FilePlan, slices: Sequence[Slice], identity: str) -> None:
        self.plan = plan
        self.slices = slices
        self.n_done = 0
        self.source: tuple[str, ...] = ()
        self._identity = identity
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._partials = [partial_path(part.path) for part in plan.parts]
        self._journal_path = journal_path(plan.path)
        self._files: list[FileIO] = []
        self._closing = ExitStack()
        self._sha256: dict[str, str] = {}
        self._hash = hashlib.sha256()
        self._error = TensorError()
        self.choices: tuple[Choice, ...] = ()
        self.is_verified = False

    def begin(self, *, force: bool) -> None:
        """Open the partial files, and continue where their journal says that they are.

        Raises StaleOutputError where they were begun otherwise, unless forced to begin anew.
        """
        journal = load_journal(self._journal_path)
        if journal is not None and journal.identity != self._identity:
            if not force:
                raise self.stale("it was begun with other settings or for another checkpoint")
            journal = None
        with disk_errors(self.plan.path):
            self.plan.path.parent.mkdir(parents=True, exist_ok=True)
            if journal is not None and journal.is_verified and self._all_there():
                self._continue(journal)
            elif journal is not None and all(path.is_file() for path in self._partials):
                self._open("r+b")
                self._continue(journal)
                self._hash_again()
            else:
                self.forget()
                sync_folder(self.plan.path.parent)
                self._open("wb")
                self._continue(Journal(self._identity))

    def job(self, piece: Slice) -> Job:
        return job_of(self.plan, self._tensors[piece.info.name])

    def pending(self) -> dict[str, QuantType]:
        """The tensors that are not complete, with their types."""
        return {
            name: tensor.quant_type
            for name, tensor in self._tensors.items()
            if tensor.gguf_name not in self._sha256
        }

    def write(
        self, piece: Slice, blocks: ByteArray, error: TensorError, *, source: tuple[str, ...]
    ) -> None:
        """Put the next slice at its place; raises NumericalError for a tensor that its type spoils.

        source: RawSlice.sha256_until of the slice.
        """
        tensor = self._tensors[piece.info.name]
        if piece.start == 0:
            self._hash = hashlib.sha256()
            self._error = TensorError()
        start = piece.start * row_nbytes(tensor.quant_type, piece.n_in)
        end = start + blocks.nbytes
        is_complete = end == tensor.nbytes
        with disk_errors(self.plan.path):
            self._write_at(tensor, start, blocks.data)
            if is_complete:
                self._write_at(tensor, end, bytes(aligned(end) - end))
        self._hash.update(blocks.data)
        self._error += error
        if is_complete:
            self._sha256[tensor.gguf_name] = self._hash.hexdigest()
            if problem := self._error.problem(tensor.quant_type):
                raise NumericalError(
                    f"{tensor.name}: as {tensor.quant_type.name} it {problem}; "
                    "choose a type with more bits"
                )
            if self.plan.row_source is not None:
                choice = self.plan.row_source.choice(tensor.name, tensor.quant_type)
                self.choices += () if choice is None else (choice,)
        self.n_done = piece.index + 1
        self.source = source

    def journal(self) -> Journal:
        return Journal(
            identity=self._identity,
            n_slices=self.n_done,
            source=self.source,
            tensor_sha256=dict(self._sha256),
            error=self._error,
            choices=self.choices,
            is_verified=self.is_verified,
        )

    def commit(self, journal: Journal) -> None:
        """Bring to the disk what was written, then the journal that says so."""
        with disk_errors(self.plan.path):
            for file in self._files:
                os.fsync(file.fileno())
            journal.save(self._journal_path)

    def complete(self, source_sha256: tuple[str, ...]) -> Written:
        """Write the headers, now that all digests are known; returns what is to be read back.

        source_sha256: of each shard.
        """
        assert len(self._sha256) == len(self.plan.tensors)
        headers = [part.header for part in self.plan.parts]
        headers[0] = fill_digests(
            headers[0],
            source_sha256=source_sha256,
            tensor_sha256=[self._sha256[tensor.gguf_name] for tensor in self.plan.tensors],
        )
        with disk_errors(self.plan.path):
            for file, header in zip(self._files, headers, strict=True):
                _write_all(file, 0, header)
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):  # so that the disk is read, not the memory
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return Written(self._partials, self._sha256)

    def accept(self) -> None:
        """Note that what was written was read back and found whole."""
        self.is_verified = True
        self.commit(self.journal())

    def publish(self) -> None:
        """Give the final names, the first part's last, since readers begin with it."""
        self.close()
        with disk_errors(self.plan.path):
            for part, partial in reversed(list(zip(self.plan.parts, self._partials, strict=True))):
                if partial.exists():
                    partial.replace(part.path)
            sync_folder(self.plan.path.parent)

    def forget(self) -> None:
        for path in (self._journal_path, partial_path(self._journal_path)):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove all that publish() has not named."""
        self.close()
        self.forget()
        for path in self._partials:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._closing.close()
        self._files = []

    def stale(self, reason: str) -> StaleOutputError:
        return StaleOutputError(
            f"{self._partials[0]}: cannot be continued, since {reason}; "
            "remove it, or give --force to begin anew"
        )

    def _all_there(self) -> bool:
        """Every part exists, under its final name or before it was given that."""
        return all(
            partial.exists() or part.path.exists()
            for partial, part in zip(self._partials, self.plan.parts, strict=True)
        )

    def _open(self, mode: Literal["r+b", "wb"]) -> None:
        for path in self._partials:
            self._files.append(self._closing.enter_context(path.open(mode, buffering=0)))

    def _continue(self, journal: Journal) -> None:
        self.n_done = journal.n_slices
        self.source = journal.source
        self._sha256 = dict(journal.tensor_sha256)
        self._error = journal.error
        self.choices = journal.choices
        self.is_verified = journal.is_verified

    def _hash_again(self) -> None:
        """Feed the hash with what is written of the tensor that the next slice continues."""
        if self.n_done == len(self.slices) or self.slices[self.n_done].start == 0:
            return
        piece = self.slices[self.n_done]
        tensor = self._tensors[piece.info.name]
        left = piece.start * row_nbytes(tensor.quant_type, piece.n_in)
        file = self._files[tensor.part]
        file.seek(self._place(tensor))
        while left and (data := file.read(min(left, 1 << 22))):
            self._hash.update(data)
            left -= len(data)

    def _write_at(self, tensor: TensorPlan, start: int, data: memoryview | bytes) -> None:
        _write_all(self._files[tensor.part], self._place(tensor) + start, data)

    def _place(self, tensor: TensorPlan) -> int:
        return len(self.plan.parts[tensor.part].header) + tensor.offset


def _write_all(file: FileIO, offset: int, data: memoryview | bytes) -> None:
    view = memoryview(data).cast("B")
    file.seek(offset)
    while view:
        view = view[file.write(view) :]
