"""A file that is not what it should be is found, and its first wrong tensor named."""

import hashlib
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from convert.checkpoint import Checkpoint
from convert.encode import QuantType, encode_rows
from convert.errors import CheckpointError, GgufError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from convert.gguf_parts import part_name
from convert.qwen2 import tensor_specs
from convert.read_back import Written, check_written
from convert.recipe import RECIPES
from convert.verify import TensorCheck, verify_model
from tests.oracles.llama_quantizer import quantize_with_llama_cpp
from tests.synthetic import Array, write_checkpoint

ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}
DOWN = "blk.0.ffn_down.weight"

Tensors = dict[str, tuple[npt.NDArray[Any], QuantType | None]]
"""Values, and their type where they are blocks."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "c", config=ONE_LAYER)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, bytes]:
    """The source's file of several types, as bytes."""
    folder = tmp_path_factory.mktemp("files")
    with Checkpoint.open(source) as checkpoint:
        return {
            name: export_gguf(checkpoint, name, folder / f"{name}.gguf").path.read_bytes()
            for name in ("F32", "BF16", "Q8_0", "Q4_K_M", "Q2_K")
        }


def checks_of(path: Path, source: Path | None = None) -> list[TensorCheck]:
    if source is None:
        return list(verify_model(path, threads=2))
    with Checkpoint.open(source) as checkpoint:
        return list(verify_model(path, source=checkpoint, threads=2))


def first_problem(path: Path, source: Path | None = None) -> str:
    return next((check.message for check in checks_of(path, source) if check.problem), "")


def without_hashes(path: Path, data: bytes) -> Path:
    """The file as another tool would have written it: our own list of hashes under another key."""
    path.write_bytes(data.replace(b"qwq.tensor_sha256", b"qwq.tensor_sha000"))
    return path


def overwrite(path: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of one tensor."""
    tensor = read_header(path).tensors[name]
    data = bytearray(path.read_bytes())
    part = data[tensor.offset : tensor.offset + tensor.nbytes]
    change(part)
    data[tensor.offset : tensor.offset + tensor.nbytes] = part
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_a_sound_file(tmp_path: Path, source: Path, files: dict[str, bytes], name: str) -> None:
    """Every tensor is read, hashed as hashlib hashes its bytes, measured, and found sound."""
    path = tmp_path / "x.gguf"
    path.write_bytes(files[name])
    header = read_header(path)
    checks = checks_of(path, source)
    assert [check.tensor for check in checks] == list(header.tensors.values())
    assert not [check.message for check in checks if check.problem]
    for check in checks:
        data = files[name][check.tensor.offset : check.tensor.offset + check.tensor.nbytes]
        assert check.sha256 == hashlib.sha256(data).hexdigest()
        assert check.error is not None
        assert (check.error.relative == 0) == (check.tensor.quant_type in (0, QuantType.BF16))
    assert not [check.message for check in checks_of(path) if check.problem]


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_sources_of_other_dtypes(tmp_path: Path, dtype: str) -> None:
    """What a float16 or float32 checkpoint loses in BF16 is within BF16's limit, in F32 it is 0."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, dtype=dtype, n_shards=2)
    for name in ("F32", "F16", "BF16", "Q6_K"):
        path = tmp_path / f"{name}.gguf"
        with Checkpoint.open(folder) as checkpoint:
            export_gguf(checkpoint, name, path)
        checks = checks_of(path, folder)
        assert not [check.message for check in checks if check.problem]
        exact = {check.error.relative == 0 for check in checks if check.error is not None}
        assert exact == {True} or name != "F32"


def test_one_file_or_shards_are_one_model(tmp_path: Path) -> None:
    """The same weights in one file and in three shards give tensors of the same bytes."""
    hashes = []
    for n_shards in (1, 3):
        folder = write_checkpoint(tmp_path / f"c{n_shards}", config=ONE_LAYER, n_shards=n_shards)
        path = tmp_path / f"{n_shards}.gguf"
        with Checkpoint.open(folder) as checkpoint:
            export_gguf(checkpoint, "Q4_K_M", path)
        hashes.append({check.tensor.name: check.sha256 for check in checks_of(path, folder)})
        sources = read_header(path).metadata["qwq.source.sha256"]
        assert isinstance(sources, list)
        shards = sorted(folder.glob("*.safetensors"))
        assert sources == [hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards]
    assert hashes[0] == hashes[1]


def test_slices_and_threads_change_nothing(
    tmp_path: Path, source: Path, files: dict[str, bytes]
) -> None:
    """A row at a time, seven, or all at once, on one thread or three: hashes and errors agree."""
    path = tmp_path / "x.gguf"
    path.write_bytes(files["Q4_K_M"])
    whole = checks_of(path, source)
    assert not any(check.problem for check in whole)
    with Checkpoint.open(source) as checkpoint:
        for threads, slice_n_weights in ((1, 1), (3, 7 * 256), (2, 1 << 30)):
            checks = list(
                verify_model(
                    path, source=checkpoint, threads=threads, slice_n_weights=slice_n_weights
                )
            )
            assert [check.sha256 for check in checks] == [check.sha256 for check in whole]
            for check, other in zip(checks, whole, strict=True):
                assert not check.problem
                assert check.error is not None
                assert other.error is not None
                assert check.error.relative == pytest.approx(other.error.relative, rel=1e-6)
                assert check.error.worst_row == pytest.approx(other.error.worst_row, rel=1e-6)
    overwrite(path, DOWN, lambda part: part.__setitem__(slice(-400, None), bytes(400)))
    for slice_n_weights in (1, 512 * 9):
        found = [check.problem for check in verify_model(path, slice_n_weights=slice_n_weights)]
        assert sum(map(bool, found)) == 1


def zero(part: bytearray) -> None:
    part[:] = bytes(len(part))


def zero_a_page(part: bytearray) -> None:
    part[1000:1600] = bytes(600)


def flip_a_scale_bit(part: bytearray) -> None:
    part[209] ^= 0x10  # Q6_K ends its block with the scale


@pytest.mark.parametrize("damage", [zero, zero_a_page, flip_a_scale_bit])
def test_damage_is_seen_against_the_source(
    tmp_path: Path, source: Path, files: dict[str, bytes], damage: Callable[[bytearray], None]
) -> None:
    """An empty tensor, an empty piece of one, one bit of a scale: known without any hash."""
    path = without_hashes(tmp_path / "x.gguf", files["Q4_K_M"])
    overwrite(path, DOWN, damage)
    assert re.search(rf"{DOWN} (differs|has a row that differs) ", first_problem(path, source))
    assert first_problem(path) == ""


def test_damage_is_seen_by_the_files_own_hashes(
    tmp_path: Path, source: Path, files: dict[str, bytes]
) -> None:
    """One bit is named without a source; hashes that came over from another file are no judge."""
    path = tmp_path / "x.gguf"
    path.write_bytes(files["Q4_K_M"])

    def flip(part: bytearray) -> None:
        part[-1] ^= 1

    overwrite(path, DOWN, flip)
    assert re.search(rf"{DOWN} has the SHA-256 \w{{16}} and the file lists", first_problem(path))
    assert first_problem(without_hashes(path, path.read_bytes())) == ""
    (tmp_path / "bf16.gguf").write_bytes(files["BF16"])
    requantized = tmp_path / "theirs.gguf"
    quantize_with_llama_cpp(tmp_path / "bf16.gguf", RECIPES["Q4_K_M"], requantized)
    assert read_header(requantized).metadata["qwq.tensor_sha256"]
    assert first_problem(requantized, source) == ""


def test_swapped_tensors(tmp_path: Path, source: Path, files: dict[str, bytes]) -> None:
    """Two tensors of one shape in each other's place: the first is named."""
    path = without_hashes(tmp_path / "x.gguf", files["Q4_K_M"])
    data = path.read_bytes()
    gate, up = b"blk.0.attn_k.weight", b"blk.0.attn_v.weight"
    swapped = data.replace(gate, b"*" * len(gate)).replace(up, gate).replace(b"*" * len(gate), up)
    path.write_bytes(swapped)
    assert re.search(r"blk\.0\.attn_[kv]\.weight differs .* 1\d\d\.", first_problem(path, source))


def test_a_weight_that_is_no_number(tmp_path: Path, source: Path, files: dict[str, bytes]) -> None:
    """NaN is named with its position, with and without the source."""
    path = without_hashes(tmp_path / "x.gguf", files["BF16"])

    def spoil(part: bytearray) -> None:
        where = 2 * (512 * 3 + 17)
        part[where : where + 2] = b"\xc0\x7f"

    overwrite(path, DOWN, spoil)
    for given in (None, source):
        assert f"{DOWN} holds a weight that is no number at [3, 17]; " in first_problem(path, given)


def test_another_checkpoint(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Other weights, other sizes and more layers than the file has are three errors."""
    path = tmp_path / "x.gguf"
    path.write_bytes(files["Q8_0"])
    other = write_checkpoint(tmp_path / "other", config=ONE_LAYER, seed=1)
    assert "token_embd.weight differs from the source by 14" in first_problem(path, other)
    wide = write_checkpoint(tmp_path / "wide", config=ONE_LAYER | {"intermediate_size": 768})
    assert re.search(
        r"ffn_\w+\.weight has the shape \[.*512.*\] and its source \[.*768.*\]; give the checkp",
        first_problem(path, wide),
    )
    deep = write_checkpoint(tmp_path / "deep", config={"num_hidden_layers": 2})
    with pytest.raises(GgufError, match=r"x\.gguf: lacks blk\.1\.attn_norm\.weight, which .+deep"):
        checks_of(path, deep)


def write_gguf(path: Path, tensors: Tensors, *, split_max_tensors: int = 0) -> Path:
    """By the gguf package, as other tools do it; split_max_tensors makes parts."""
    writer = gguf.GGUFWriter(path, "qwen2", split_max_tensors=split_max_tensors)
    for name, (values, quant_type) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_of_others(tmp_path: Path) -> None:
    """Any GGUF can be verified: three dimensions, whole numbers, types that we do not write."""
    values = np.random.default_rng(0).normal(size=(2, 3, 64)).astype(np.float32)
    blocks = encode_rows(values.reshape(6, 64), QuantType.MXFP4)
    path = write_gguf(
        tmp_path / "x.gguf",
        {
            "three": (values, None),
            "ids": (np.arange(6, dtype=np.int32), None),
            "blocks": (blocks, QuantType.MXFP4),
        },
    )
    checks = checks_of(path)
    assert [check.tensor.shape for check in checks] == [(2, 3, 64), (6,), (6, 64)]
    assert not any(check.problem for check in checks)


def model_tensors(folder: Path) -> Tensors:
    """The tensors of a checkpoint under their GGUF names, as float32."""
    with Checkpoint.open(folder) as checkpoint:
        return {
            spec.gguf_name: (checkpoint.read(spec.name), None)
            for spec in tensor_specs(checkpoint.model)
        }


def test_tensors_without_a_source(tmp_path: Path, source: Path) -> None:
    """A tensor that the checkpoint has not, and one of whole numbers, are named."""
    tensors = model_tensors(source)
    extra = write_gguf(
        tmp_path / "extra.gguf", tensors | {"rope_freqs.weight": tensors["output_norm.weight"]}
    )
    assert "rope_freqs.weight has no source in" in first_problem(extra, source)
    whole = tensors | {"output_norm.weight": (np.ones(256, np.int32), None)}
    path = write_gguf(tmp_path / "whole.gguf", whole)
    assert "output_norm.weight is stored as I32, which" in first_problem(path, source)


def test_tied_embeddings(tmp_path: Path) -> None:
    """One tensor serves twice; the file of a tool that stores it twice is sound too."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER | {"tie_word_embeddings": True})
    path = tmp_path / "x.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q4_K_M", path)
    assert "output.weight" not in read_header(path).tensors
    assert first_problem(path, folder) == ""
    tensors = model_tensors(folder)
    tensors["output.weight"] = tensors["token_embd.weight"]
    assert first_problem(write_gguf(tmp_path / "y.gguf", tensors), folder) == ""


@pytest.fixture
def parts(tmp_path: Path, source: Path) -> list[Path]:
    """The source in four parts, by the gguf package."""
    write_gguf(tmp_path / "m.gguf", model_tensors(source), split_max_tensors=4)
    paths = sorted(tmp_path.glob("m-*.gguf"))
    assert [path.name for path in paths] == [part_name("m", i, 4) for i in (1, 2, 3, 4)]
    return paths


def test_parts(parts: list[Path], source: Path) -> None:
    """The first part stands for all, and damage in the last is named with its file."""
    checks = checks_of(parts[0], source)
    assert len(checks) == 15
    assert {check.path for check in checks} == set(parts)
    assert not any(check.problem for check in checks)
    overwrite(parts[3], DOWN, zero)
    assert f"{parts[3]}: {DOWN} differs from the source by 100" in first_problem(parts[0], source)


def test_parts_that_do_not_fit(parts: list[Path]) -> None:
    """Another part than the first, one that is missing, renamed, or another's."""
    with pytest.raises(GgufError, match=r"is part 2 of 4; give the first, m-00001-of-00004\.gguf"):
        checks_of(parts[1])
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(GgufError, match=r"says it is part 1 of 4 .+ name it MODEL-00001-of-00004"):
        checks_of(renamed)
    renamed.rename(parts[0])
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(GgufError, match="says it is part 2 of 4 and stands as part 3 of 4"):
        checks_of(parts[0])
    number = b"split.no" + struct.pack("<I", 2)
    second = parts[1].read_bytes()
    where = second.index(number) + len(number)
    parts[2].write_bytes(second[:where] + struct.pack("<H", 2) + second[where + 2 :])
    with pytest.raises(GgufError, match="is in an earlier part too"):
        checks_of(parts[0])
    parts[2].write_bytes(third)
    first = parts[0].read_bytes()
    count = b"split.tensors.count" + struct.pack("<I", 5)
    where = first.index(count) + len(count)
    parts[0].write_bytes(first[:where] + struct.pack("<i", 16) + first[where + 4 :])
    with pytest.raises(GgufError, match="announces 16 tensors and the parts hold 15"):
        checks_of(parts[0])
    parts[0].write_bytes(first)
    parts[3].unlink()
    with pytest.raises(GgufError, match=r"m-00004-of-00004\.gguf: the part is missing, one of 4"):
        checks_of(parts[0])


def test_hostile_files(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Cut at any place, of another kind, or absent: a GgufError with the path, never a crash."""
    path = tmp_path / "x.gguf"
    data = files["Q4_K_M"]
    for length in [0, 3, 8, 100, 5000, *range(6000, len(data) - 64, len(data) // 40)]:
        path.write_bytes(data[:length])
        with pytest.raises(GgufError, match=r"x\.gguf: .+; "):
            checks_of(path)
    with pytest.raises(GgufError, match=r"absent\.gguf: cannot be read"):
        checks_of(tmp_path / "absent.gguf")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    """Truncation after the header was read is an error with the tensor's name."""
    path = tmp_path / "x.gguf"
    path.write_bytes(files["F32"])
    checks = verify_model(path, threads=1)
    next(checks)
    path.write_bytes(files["F32"][:-10_000])
    with pytest.raises(GgufError, match=r"x\.gguf: \S+ ends [\d,]+ bytes early, the file changed"):
        list(checks)


def test_a_source_that_is_damaged(tmp_path: Path, files: dict[str, bytes]) -> None:
    """NaN in the checkpoint is the checkpoint's error, not the file's."""

    def spoil(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"][3, 4] = np.nan

    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, edit=spoil)
    path = tmp_path / "x.gguf"
    path.write_bytes(files["Q8_0"])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds nan at \[3, 4\]"):
        checks_of(path, folder)


def test_progress_and_memory(tmp_path: Path) -> None:
    """Every byte counts once, and a file of 49 MB passes through in a few slices."""
    values = np.random.default_rng(0).normal(size=(48_000, 256)).astype(np.float32)
    path = write_gguf(tmp_path / "x.gguf", {"big": (values, None)})
    del values
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        (check,) = verify_model(path, threads=1, on_progress=lambda *at: seen.append(at))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert check.tensor.nbytes == 48_000 * 256 * 4
    assert seen == sorted(seen)
    assert seen[-1] == (check.tensor.nbytes, check.tensor.nbytes)
    assert peak < 40_000_000


def test_reading_back(tmp_path: Path, files: dict[str, bytes]) -> None:
    """What was written passes; another byte, another tensor and a missing one do not."""
    path = tmp_path / "x.gguf.partial"
    path.write_bytes(files["Q4_K_M"])
    hashes = {
        name: hashlib.sha256(
            files["Q4_K_M"][tensor.offset : tensor.offset + tensor.nbytes]
        ).hexdigest()
        for name, tensor in read_header(path).tensors.items()
    }
    seen: list[tuple[int, int]] = []
    check_written([Written([path], hashes)], on_progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in read_header(path).tensors.values())
    with pytest.raises(GgufError, match=r"extra was not to be written or is not there; "):
        check_written([Written([path], hashes | {"extra": "0"})])

    def flip(part: bytearray) -> None:
        part[7] ^= 1

    overwrite(path, DOWN, flip)
    other = tmp_path / "other.gguf.partial"
    other.write_bytes(path.read_bytes())
    overwrite(other, "token_embd.weight", flip)
    both = [Written([path], hashes), Written([other], hashes)]
    for threads in (1, 4):
        with pytest.raises(GgufError, match=rf"x\.gguf\.partial: {DOWN} reads back with the SHA-"):
            check_written(both, threads=threads)
        with pytest.raises(GgufError, match=r"other\.gguf\.partial: token_embd\.weight reads "):
            check_written(both[::-1], threads=threads)


def test_reading_back_with_the_gguf_package(tmp_path: Path) -> None:
    """A header that we take and the gguf package does not is no header to leave behind."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_uint64("general.alignment", 32)
    writer.add_tensor("one", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hashes = {"one": hashlib.sha256(np.ones(8, np.float32).tobytes()).hexdigest()}
    with pytest.raises(GgufError, match=r"x\.gguf: the gguf package cannot read it \(Bad type"):
        check_written([Written([tmp_path / "x.gguf"], hashes)])
