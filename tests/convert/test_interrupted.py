"""Exports that are interrupted at any moment: continued to the same bytes, or refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from convert import gguf_export
from convert.checkpoint import Checkpoint
from convert.encode import ByteArray, encode_rows
from convert.errors import DiskFullError, GgufError, OutputExistsError, StaleOutputError
from convert.files import partial_path
from convert.gguf_export import export_planned
from convert.journal import journal_path, load_journal
from convert.plan import plan_file
from convert.recipe import RECIPES
from tests.interrupted_export import plans_in
from tests.processes import largest_file
from tests.synthetic import write_checkpoint

ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _commit_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every slice there is a journal, however slow the disk is."""
    submit = ThreadPoolExecutor.submit

    def submit_and_wait(pool: ThreadPoolExecutor, work: Any, *arguments: Any) -> Future[Any]:
        future = submit(pool, work, *arguments)
        if work is gguf_export._commit:
            wait([future])
        return future

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_and_wait)
    monkeypatch.setattr(gguf_export, "COMMIT_INTERVAL_S", 0.0)


def export(
    folder: Path,
    path: Path,
    *,
    recipe_name: str = "Q8_0",
    stop_at: float = 2.0,
    force: bool = False,
    threads: int = 2,
) -> int:
    """Export in slices of 5,000 weights; Ctrl-C where the fraction `stop_at` is done.

    Returns how many slices were encoded.
    """
    n_encoded = 0

    def stop(n_done: int, n_total: int) -> None:
        nonlocal n_encoded
        n_encoded += 1
        if n_done >= stop_at * n_total:
            raise KeyboardInterrupt

    with Checkpoint.open(folder) as checkpoint:
        export_planned(
            checkpoint,
            [plan_file(checkpoint, RECIPES[recipe_name], path)],
            threads=threads,
            force=force,
            on_progress=stop,
            slice_n_weights=5_000,
        )
    return n_encoded


@pytest.fixture
def begun(tmp_path: Path, small: Path) -> Path:
    """The path of an output of `small` that was interrupted three quarters through."""
    path = tmp_path / "o.gguf"
    with pytest.raises(KeyboardInterrupt):
        export(small, path, stop_at=0.75)
    assert not path.exists()
    assert partial_path(path).exists()
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_50_random_moments(tmp_path: Path, small: Path) -> None:
    """SIGKILL anywhere: under the final names nothing but whole files; continued, the same bytes.

    Catches a journal that promises what is not written, names given too early, lost hash states.
    """
    command = [sys.executable, "-m", "tests.interrupted_export", str(small), str(tmp_path), "50"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] == 50
    assert report["continued"] >= 15
    assert report["done"] >= 5


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_gptq_killed_at_12_random_moments(tmp_path: Path) -> None:
    """The same of GPTQ's folders, layer by layer.

    Catches a layer noted as done before its shard is on the disk, and states of another layer.
    """
    config = {"num_hidden_layers": 3, "max_window_layers": 3}
    source = write_checkpoint(tmp_path / "source", config=config)
    command = [sys.executable, "-m", "tests.interrupted_gptq", str(source), str(tmp_path), "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] == 12
    assert report["continued"] >= 2
    assert report["done"] >= 1


def test_continues_where_it_was(
    begun: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal holds is not encoded again, whatever the threads; the bytes are the same."""
    journal = load_journal(journal_path(begun))
    assert journal is not None
    n_encoded = 0

    def count(*arguments: Any, **options: Any) -> ByteArray:
        nonlocal n_encoded
        n_encoded += 1
        return encode_rows(*arguments, **options)

    monkeypatch.setattr("convert.slice_encoder.encode_rows", count)
    n_slices = export(small, begun, threads=1)
    assert 20 < journal.n_slices == n_slices - n_encoded
    export(small, tmp_path / "at-once.gguf")
    assert begun.read_bytes() == (tmp_path / "at-once.gguf").read_bytes()
    assert not partial_path(begun).exists()
    assert not journal_path(begun).exists()


def other_weights(folder: Path) -> None:
    write_checkpoint(folder, config=ONE_LAYER, n_shards=3, seed=1)


def one_weight(folder: Path) -> None:
    """The first shard's first weight; its header and size stay."""
    shard = folder / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    shard.write_bytes(data)


def other_shape(folder: Path) -> None:
    write_checkpoint(folder, config=ONE_LAYER | {"intermediate_size": 256}, n_shards=3)


def other_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("assistant", "helper"))


@pytest.mark.parametrize("change", [other_weights, one_weight, other_shape, other_template])
def test_never_continues_with_another_checkpoint(
    begun: Path, small: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    """Refused, the begun work untouched; begun anew with force, with the new one's bytes alone."""
    change(small)
    before = partial_path(begun).read_bytes()
    with pytest.raises(StaleOutputError, match=r"o\.gguf\.partial: cannot be continued.+--force"):
        export(small, begun)
    assert partial_path(begun).read_bytes() == before
    assert not begun.exists()
    export(small, begun, force=True)
    export(small, tmp_path / "at-once.gguf")
    assert begun.read_bytes() == (tmp_path / "at-once.gguf").read_bytes()


def test_never_continues_with_another_type(begun: Path, small: Path) -> None:
    """The same name for another type is refused too."""
    with pytest.raises(StaleOutputError, match="begun with other settings"):
        export(small, begun, recipe_name="Q4_0")


def test_damage_to_begun_work_is_found(begun: Path, small: Path) -> None:
    """A bit of the partial file flips between two runs: the tensor is named, no file is left."""
    with Checkpoint.open(small) as checkpoint:
        plan = plan_file(checkpoint, RECIPES["Q8_0"], begun)
    tensor = next(one for one in plan.tensors if one.gguf_name == "token_embd.weight")
    data = bytearray(partial_path(begun).read_bytes())
    data[len(plan.parts[0].header) + tensor.offset + tensor.nbytes // 2] ^= 1
    partial_path(begun).write_bytes(data)
    with pytest.raises(GgufError, match=r"token_embd\.weight"):
        export(small, begun)
    assert not [path for path in begun.parent.iterdir() if path.name.startswith(begun.name)]


def test_another_journal_is_no_journal(begun: Path, small: Path, tmp_path: Path) -> None:
    """A journal cut short or of another make: begun anew, same bytes."""
    text = journal_path(begun).read_text()
    export(small, tmp_path / "at-once.gguf")
    for damaged in ("", text[:-9], "[]", text.replace('"n_slices": ', '"n_slices": "x", "n": ')):
        begun.unlink(missing_ok=True)
        journal_path(begun).write_text(damaged)
        partial_path(begun).write_bytes(b"something else")
        export(small, begun)
        assert begun.read_bytes() == (tmp_path / "at-once.gguf").read_bytes()


def test_interrupted_while_naming(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some files of the outputs are named and some are not: the same call names the rest."""

    def export_both() -> None:
        with Checkpoint.open(small) as checkpoint:
            plans = plans_in(checkpoint, tmp_path)
            export_planned(checkpoint, plans, slice_n_weights=5_000)

    def replace(self: Path, target: Path) -> Path:
        if target.name == "parts-00002-of-00003.gguf":
            raise KeyboardInterrupt
        return rename(self, target)

    rename = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            export_both()
    names = {"whole.gguf", "parts-00003-of-00003.gguf"}
    assert {path.name for path in tmp_path.glob("*.gguf")} == names
    (tmp_path / "whole.gguf").unlink()  # and one is lost meanwhile: it is made again
    export_both()
    names |= {"parts-00001-of-00003.gguf", "parts-00002-of-00003.gguf"}
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == names
    with pytest.raises(OutputExistsError):
        export_both()


def test_a_full_disk_is_not_the_end(tmp_path: Path, small: Path) -> None:
    """The disk takes no more half-way: a typed error; with room again the same call goes on."""
    path = tmp_path / "o.gguf"
    with largest_file(500_000), pytest.raises(DiskFullError, match="holds no file of this size"):
        export(small, path)
    assert not path.exists()
    journal = load_journal(journal_path(path))
    assert journal is not None
    assert journal.n_slices > 20
    export(small, path)
    export(small, tmp_path / "at-once.gguf")
    assert path.read_bytes() == (tmp_path / "at-once.gguf").read_bytes()
