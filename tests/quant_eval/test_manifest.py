"""What an output folder remembers: hashes that follow the bytes, origins, results."""

import hashlib
import os
from pathlib import Path

import pytest

from quant_eval import manifest as manifest_module
from quant_eval.manifest import Manifest, digest


def touch(path: Path, text: str, mtime_ns: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_hashes_follow_the_bytes(tmp_path: Path) -> None:
    """Catches a hash that outlives the file it was taken of."""
    file = tmp_path / "a.gguf"
    touch(file, "one", 1_000)
    manifest = Manifest(tmp_path)
    assert manifest.sha256_of(file) == hashlib.sha256(b"one").hexdigest()
    touch(file, "two", 2_000)
    assert manifest.sha256_of(file) == hashlib.sha256(b"two").hexdigest()


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Catches a file that passes for another of its name, size and time in another folder."""
    first, second = tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf"
    touch(first, "one", 1_000)
    touch(second, "two", 1_000)
    manifest = Manifest(tmp_path / "out")
    assert manifest.sha256_of(first) == hashlib.sha256(b"one").hexdigest()
    assert manifest.sha256_of(second) == hashlib.sha256(b"two").hexdigest()
    assert manifest.model_sha256(tmp_path / "a") == manifest.model_sha256(tmp_path / "b")
    touch(tmp_path / "a" / "config.json", "1", 1_000)
    touch(tmp_path / "b" / "config.json", "2", 1_000)
    assert manifest.model_sha256(tmp_path / "a") != manifest.model_sha256(tmp_path / "b")


def test_a_split_file_is_known_by_all_its_parts(tmp_path: Path) -> None:
    """Catches a change in the second part that nobody sees."""
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        touch(part, "one", 1_000)
    manifest = Manifest(tmp_path)
    before = manifest.sha256_of(parts[0])
    touch(parts[1], "two", 2_000)
    assert manifest.sha256_of(parts[0]) != before
    assert manifest.sha256_of(parts[1]) == hashlib.sha256(b"two").hexdigest()


def test_a_known_file_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second run that hashes 65 GB again."""
    file = tmp_path / "a.gguf"
    touch(file, "one", 1_000)
    sha256 = Manifest(tmp_path).sha256_of(file)
    monkeypatch.setattr(manifest_module, "sha256_of", None)
    assert Manifest(tmp_path).sha256_of(file) == sha256


def test_a_folder_is_known_by_names_and_bytes(tmp_path: Path) -> None:
    """Catches a folder whose hash misses a renamed, a nested or a changed file."""
    manifest = Manifest(tmp_path)
    seen: set[str] = set()
    for change in (("m/x.json", "1"), ("m/y.json", "1"), ("m/z/y.json", "1"), ("m/x.json", "2")):
        touch(tmp_path / change[0], change[1], len(seen))
        seen.add(manifest.sha256_of(tmp_path / "m"))
    (tmp_path / "m/x.json").rename(tmp_path / "m/w.json")
    seen.add(manifest.sha256_of(tmp_path / "m"))
    assert len(seen) == 5


def test_a_checkpoint_is_known_by_what_a_conversion_reads(tmp_path: Path) -> None:
    """Catches a checkpoint that seems new because something was put beside it."""
    folder = tmp_path / "checkpoint"
    touch(folder / "config.json", "{}", 1)
    touch(folder / "model.safetensors", "weights", 1)
    manifest = Manifest(tmp_path / "out")
    before = manifest.checkpoint_sha256(folder)
    touch(folder / "notes.gguf", "x", 1)
    assert manifest.checkpoint_sha256(folder) == before
    touch(folder / "model.safetensors", "Weights", 2)
    assert manifest.checkpoint_sha256(folder) != before


def test_the_model_card_is_no_part_of_the_model(tmp_path: Path) -> None:
    """Catches results and baselines that are thrown away for a word changed in a README."""
    folder = tmp_path / "checkpoint"
    touch(folder / "model.safetensors", "weights", 1)
    touch(folder / "README.md", "card", 1)
    manifest = Manifest(tmp_path / "out")
    before = manifest.model_sha256(folder)
    touch(folder / "README.md", "Card", 2)
    assert manifest.model_sha256(folder) == before
    touch(folder / "chat_template.jinja", "x", 2)
    assert manifest.model_sha256(folder) != before


def test_an_origin_lasts_as_long_as_the_file(tmp_path: Path) -> None:
    """Catches a file changed by hand that passes for the one that was made."""
    file = tmp_path / "a.gguf"
    touch(file, "one", 1_000)
    manifest = Manifest(tmp_path)
    assert manifest.origin_of(file) is None
    manifest.record(file, "made of this")
    assert Manifest(tmp_path).origin_of(file) == "made of this"
    touch(file, "two", 2_000)
    assert Manifest(tmp_path).origin_of(file) is None


def test_a_check_is_remembered_until_the_file_is_made_again(tmp_path: Path) -> None:
    """Catches a new file that passes as checked because an older one was."""
    file = tmp_path / "a.gguf"
    touch(file, "one", 1_000)
    manifest = Manifest(tmp_path)
    manifest.record(file, "x")
    assert not manifest.is_checked(file)
    manifest.record_check(file)
    assert Manifest(tmp_path).is_checked(file)
    manifest.record(file, "x")
    assert not Manifest(tmp_path).is_checked(file)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 99}', "\x00"])
def test_a_damaged_memory_is_an_empty_one(tmp_path: Path, text: str) -> None:
    """Catches a crash on a file that was cut or is of another version."""
    touch(tmp_path / "manifest.json", text, 1)
    file = tmp_path / "a.gguf"
    touch(file, "one", 1_000)
    manifest = Manifest(tmp_path)
    assert manifest.origin_of(file) is None


def test_digest_ignores_the_order_of_keys() -> None:
    """Catches a key that changes from run to run."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
