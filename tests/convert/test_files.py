"""Outputs appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from convert.errors import DiskFullError, OutputBusyError, OutputExistsError, QwqError
from convert.files import (
    check_disk_space,
    partial_path,
    replacing_file,
    replacing_folder,
    sha256_of,
    sole_writer,
)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    """Until the end only the partial name exists; a folder that is missing is made."""
    path = tmp_path / "deep" / "out.bin"
    with replacing_file(path) as file:
        file.write(b"abc")
        assert not path.exists()
        assert partial_path(path).exists()
    assert path.read_bytes() == b"abc"
    assert not partial_path(path).exists()
    assert sha256_of(path).startswith("ba7816bf8f01cfea")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    """On any error, an interrupt included, the old file stays and the partial one goes."""
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with replacing_file(path, force=True) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert not partial_path(path).exists()


def test_existing_outputs_are_refused(tmp_path: Path) -> None:
    """Files and folders alike, unless forced; a forced folder loses its old contents."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(OutputExistsError), replacing_folder(folder):
        pass
    with pytest.raises(OutputExistsError), replacing_file(folder):
        pass
    with replacing_folder(folder, force=True) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "new").write_text("x")
        assert (folder / "old").exists()
    assert [path.name for path in folder.rglob("*")] == ["inner", "new"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """What was written into the partial folder goes with the error."""
    folder = tmp_path / "out"

    def write_half() -> None:
        with replacing_folder(folder) as partial:
            (partial / "x").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A parent that is a file is named, with the remedy."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(QwqError, match=r"x\.bin: cannot be written \(.+\); choose another place"),
        replacing_file(tmp_path / "file" / "x.bin"),
    ):
        pass


def test_disk_space(tmp_path: Path) -> None:
    """More than any disk holds is refused with both numbers, for a folder that is not there yet."""
    check_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        DiskFullError, match=r"1,152,921,504,606,846,976 bytes are needed and [\d,]+"
    ):
        check_disk_space(tmp_path / "not" / "yet", 1 << 60)


HOLDING = """
import sys, time
from pathlib import Path
from convert.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_makes_an_output(tmp_path: Path) -> None:
    """Catches two runs that write into one file; one that was killed is in nobody's way."""
    path = tmp_path / "deep" / "out.gguf"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(OutputBusyError, match=r"out\.gguf: another process"), sole_writer(path):
            pass
        with sole_writer(path.with_name("other.gguf")):
            pass
        other.kill()
    with sole_writer(path):
        pass
    assert list(path.parent.iterdir()) == []
