"""One pass over a checkpoint: bytes that never change, bounded memory, nothing left by errors."""

import hashlib
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest

from convert import gguf_export
from convert.checkpoint import Checkpoint
from convert.errors import (
    CheckpointError,
    DiskFullError,
    NumericalError,
    OutputBusyError,
    OutputExistsError,
)
from convert.files import partial_path
from convert.gguf_export import GgufResult, export_gguf, export_planned
from convert.gguf_header import read_header
from convert.gguf_output import GgufOutput
from convert.plan import plan_file
from convert.recipe import RECIPES
from convert.slice_encoder import Encoded, Job, encode_slice
from convert.source_reader import RawSlice, Slice, SourceReader
from tests.oracles.llama_quantizer import quantize_with_llama_cpp, stored_tensors
from tests.synthetic import Array, write_checkpoint

NANO = Path(__file__).parents[2] / "quant_eval/nano/checkpoint"
ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
WAIT_S = 120.0


def export(folder: Path, recipe_name: str, path: Path, *, threads: int = 2) -> GgufResult:
    with Checkpoint.open(folder) as checkpoint:
        return export_gguf(checkpoint, recipe_name, path, threads=threads)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_sources_of_other_dtypes(tmp_path: Path, dtype: str) -> None:
    """Float16 and float32 checkpoints encode from their exact values: from an F32 file alike."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, dtype=dtype)
    export(folder, "F32", tmp_path / "f32.gguf")
    export(folder, "Q4_K_M", tmp_path / "ours.gguf")
    quantize_with_llama_cpp(tmp_path / "f32.gguf", RECIPES["Q4_K_M"], tmp_path / "theirs.gguf")
    assert stored_tensors(tmp_path / "ours.gguf") == stored_tensors(tmp_path / "theirs.gguf")


def test_slices_threads_and_company_change_no_byte(tmp_path: Path) -> None:
    """A row at a time or all at once, one thread or three, alone or with other types: one file."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER)
    with Checkpoint.open(folder) as checkpoint:

        def hashes(names: tuple[str, ...], *, threads: int, slice_n_weights: int) -> list[str]:
            plans = [
                plan_file(checkpoint, RECIPES[name], tmp_path / f"{name}.gguf") for name in names
            ]
            results = export_planned(
                checkpoint, plans, threads=threads, force=True, slice_n_weights=slice_n_weights
            )
            data = [result.path.read_bytes() for result in results]
            assert [len(d) for d in data] == [plan.nbytes for plan in plans]
            return [hashlib.sha256(d).hexdigest() for d in data]

        alone = hashes(("Q4_K_M",), threads=1, slice_n_weights=1 << 22)
        assert hashes(("Q4_K_M",), threads=3, slice_n_weights=1) == alone
        assert hashes(("Q4_K_M",), threads=2, slice_n_weights=5000) == alone
        together = hashes(("F16", "Q4_K_M", "Q2_K"), threads=2, slice_n_weights=70_000)
        assert together[1:2] == alone


def test_same_input_same_bytes(tmp_path: Path) -> None:
    """The file of a known checkpoint never changes unnoticed, on no machine and by no upgrade."""
    folder = write_checkpoint(tmp_path / "golden", config=ONE_LAYER)
    export(folder, "Q4_K_M", tmp_path / "out.gguf")
    sha256 = hashlib.sha256((tmp_path / "out.gguf").read_bytes()).hexdigest()
    assert sha256 == "58a92415e47247fb585ee50f76642b0baf2f492a3de928dc3f39f2192df47a54"


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    """Progress rises to exactly the bytes of the checkpoint's tensors, two a weight."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER)
    seen: list[tuple[int, int]] = []
    with Checkpoint.open(folder) as checkpoint:
        result = export_gguf(
            checkpoint, "q8_0", tmp_path / "o.gguf", on_progress=lambda *at: seen.append(at)
        )
    assert seen == sorted(seen)
    assert seen[-1] == (2 * result.n_weights, 2 * result.n_weights)
    assert result.nbytes == result.path.stat().st_size
    assert 8.5 <= result.bits_per_weight < 8.6


def test_reading_encoding_and_writing_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slices are encoded at a time, others are read and encoded while one is written.

    Each step waits for the others to begin: one after another they would wait for ever.
    """
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER)
    together = Barrier(2)
    read_ahead, encoded_ahead = Event(), Event()
    read, write = SourceReader.read, GgufOutput.write

    def encode_together(raw: RawSlice, piece: Slice, jobs: Sequence[Job]) -> Encoded:
        if piece.index < 2:
            together.wait(WAIT_S)
        else:
            encoded_ahead.set()
        return encode_slice(raw, piece, jobs)

    def read_early(reader: SourceReader, piece: Slice) -> RawSlice:
        if piece.index > 2:
            read_ahead.set()
        return read(reader, piece)

    def write_late(output: GgufOutput, piece: Slice, *parts: Any, **source: Any) -> None:
        assert read_ahead.wait(WAIT_S)
        assert encoded_ahead.wait(WAIT_S)
        write(output, piece, *parts, **source)

    monkeypatch.setattr(gguf_export, "encode_slice", encode_together)
    monkeypatch.setattr(SourceReader, "read", read_early)
    monkeypatch.setattr(GgufOutput, "write", write_late)
    export(folder, "Q8_0", tmp_path / "o.gguf", threads=2)


def test_memory_is_bounded_by_slices(tmp_path: Path) -> None:
    """Three matrices of 6 million weights, 25 MB each as float32, pass through in 16 MB."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER | {"intermediate_size": 24_576})
    with Checkpoint.open(folder) as checkpoint:
        plans = [plan_file(checkpoint, RECIPES["Q8_0"], tmp_path / "o.gguf")]
        tracemalloc.start()
        try:
            export_planned(checkpoint, plans, slice_n_weights=1 << 16, threads=2)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 16_000_000


def nothing_left(path: Path) -> bool:
    return not path.exists() and not partial_path(path).exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_leave_no_file(tmp_path: Path, value: float) -> None:
    """NaN in the last tensor: the error comes late, and what was written until then is gone."""

    def spoil(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"][319, 255] = value

    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, edit=spoil)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds (nan|inf) at \[319, 255\]"):
        export(folder, "Q4_K_M", tmp_path / "o.gguf")
    assert nothing_left(tmp_path / "o.gguf")


def test_weights_too_large_for_float16(tmp_path: Path) -> None:
    """A weight that F16, or a block's F16 scale, cannot hold is refused, not stored as infinity."""

    def enlarge(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"][1, 2] = 1e12

    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, edit=enlarge)
    for recipe_name in ("F16", "Q8_0", "Q4_K_M"):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: .+ too large for .+BF16"):
            export(folder, recipe_name, tmp_path / "o.gguf")
    assert nothing_left(tmp_path / "o.gguf")
    export(folder, "BF16", tmp_path / "o.gguf")


def test_a_tensor_that_its_type_spoils(tmp_path: Path) -> None:
    """Weights too small for a block's float16 scale become zeros: named, and there is no file."""

    def shrink(tensors: dict[str, Array]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1e-9

    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, edit=shrink)
    with pytest.raises(NumericalError, match=r"up_proj\.weight: as Q8_0 it differs .+ more bits"):
        export(folder, "Q8_0", tmp_path / "o.gguf")
    assert nothing_left(tmp_path / "o.gguf")


def test_existing_output(tmp_path: Path, synthetic: Path) -> None:
    """An output that is there is kept, and replaced with force."""
    path = tmp_path / "o.gguf"
    path.write_bytes(b"precious")
    with (
        Checkpoint.open(synthetic) as checkpoint,
        pytest.raises(OutputExistsError, match="--force"),
    ):
        export_gguf(checkpoint, "F32", path)
    assert path.read_bytes() == b"precious"
    with Checkpoint.open(synthetic) as checkpoint:
        export_gguf(checkpoint, "F32", path, force=True)
    assert len(read_header(path).tensors) == 99


def test_a_second_run_leaves_the_first_alone(tmp_path: Path, synthetic: Path) -> None:
    """Catches two runs in one partial file, the second even told to begin anew."""
    path = tmp_path / "out.gguf"
    refused: list[bool] = []

    def run_again(_done: int, _total: int) -> None:
        with pytest.raises(OutputBusyError):
            export_gguf(checkpoint, "Q8_0", path, force=True)
        refused.append(True)

    with Checkpoint.open(synthetic) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, on_progress=run_again)
        export_gguf(checkpoint, "Q8_0", tmp_path / "alone.gguf")
    assert refused
    assert path.read_bytes() == (tmp_path / "alone.gguf").read_bytes()


def test_disk_too_small_is_known_before_work(
    tmp_path: Path, synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's bytes are held against the free bytes before the first is written."""
    monkeypatch.setattr("convert.files.free_space", lambda _folder: 1_000_000)
    with pytest.raises(DiskFullError, match=r"4,\d+,\d+ bytes are needed and 1,000,000 are free"):
        export(synthetic, "Q8_0", tmp_path / "o.gguf")
    assert nothing_left(tmp_path / "o.gguf")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_disk_that_fills_up(tmp_path: Path, synthetic: Path) -> None:
    """ENOSPC in the middle of the work: a typed error, and nothing under the final name."""
    path = tmp_path / "o.gguf"
    partial_path(path).symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"o\.gguf: the disk filled up while it was written"):
        export(synthetic, "Q8_0", path)
    assert not path.exists()
