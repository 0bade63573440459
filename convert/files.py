"""Outputs that appear whole or not at all, hashes, and room on the disk."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from convert.errors import DiskFullError, OutputBusyError, OutputExistsError, QwqError

_UNWRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise OutputExistsError where `path` exists and may not be replaced."""
    if path.exists() and not force:
        raise OutputExistsError(f"{path}: exists already; give --force to replace it")


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep every other process from making `path` meanwhile, by a lock on `<path>.lock`.

    A process that is killed holds no lock. Raises OutputBusyError where another process has it.
    """
    lock = FileLock(path.with_name(path.name + ".lock"), blocking=False)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise OutputBusyError(
                f"{path}: another process is making it; wait for its end, or choose another place "
                "with -o"
            ) from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows keeps a file that is open, and then removes it
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_disk_space(folder: Path, n_needed: int) -> None:
    """Raise DiskFullError where the disk of `folder`, which may not exist yet, lacks the bytes."""
    n_free = free_space(folder)
    if n_free < n_needed:
        raise DiskFullError(
            f"{folder}: {n_needed:,} bytes are needed and {n_free:,} are free; "
            "free some space or choose another disk with -o"
        )


def missing_nbytes(path: Path, nbytes: int) -> int:
    """Bytes that take new room where `path` takes nbytes: all but those of unfinished work."""
    return max(0, nbytes - allocated_nbytes(partial_path(path)))


def free_space(folder: Path) -> int:
    """Free bytes on the disk that `folder` is or will be on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def allocated_nbytes(path: Path) -> int:
    """Bytes of the disk that a file or a folder's files take, holes left out; 0 where none is."""
    if path.is_dir():
        return sum(allocated_nbytes(inside) for inside in path.iterdir())
    if not path.exists():
        return 0
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def format_nbytes(nbytes: int) -> str:
    """In units of powers of ten, as disks and model pages count."""
    unit, name = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / unit:.3f} {name}"


@contextmanager
def replacing_file(path: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Open `<path>.partial` for writing and give it the name `path` once all of it is on the disk.

    On any error nothing is left under either name.
    Raises OutputExistsError, and DiskFullError where the disk fills up while writing.
    """
    refuse_existing(path, force=force)
    partial = partial_path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def replacing_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Make the folder `<path>.partial` and name it `path` once all its files are on the disk.

    On any error nothing new is left under either name.
    Raises OutputExistsError, and DiskFullError where the disk fills up while writing.
    """
    refuse_existing(path, force=force)
    partial = partial_path(path)
    with disk_errors(path):
        remove(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            finish_folder(partial, path)
        except BaseException:
            remove(partial)
            raise


def finish_folder(partial: Path, path: Path) -> None:
    """Give a folder its final name once all its files are on the disk."""
    for file_path in sorted(partial.rglob("*")):
        if file_path.is_file():
            sync_file(file_path)
    sync_folder(partial)
    remove(path)
    partial.replace(path)
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and a place that cannot be written into QwqErrors about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{path}: the disk filled up while it was written; "
                "free some space or choose another disk with -o"
            ) from error
        if error.errno == errno.EFBIG:
            raise DiskFullError(
                f"{path}: its disk holds no file of this size; choose another disk with -o, or "
                "give --split-size"
            ) from error
        if error.errno in _UNWRITABLE:
            raise QwqError(
                f"{path}: cannot be written ({error.strerror}); choose another place with -o"
            ) from error
        raise


def sync_file(path: Path) -> None:
    """Return when the file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename in the folder durable, where the system lets a folder be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
