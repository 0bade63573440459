"""Importance files: both formats read as llama.cpp reads them, written as it writes them."""

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from convert.encode import Float32Array
from convert.errors import GgufError, OutputExistsError, QwqError
from convert.imatrix import Imatrix, match_imatrix, read_imatrix, write_imatrix
from convert.qwen2 import Qwen2Config, parse_config, tensor_specs
from tests.synthetic import CONFIG


@pytest.fixture(scope="module")
def model() -> Qwen2Config:
    return parse_config(CONFIG | {"num_hidden_layers": 1}, "one layer")


def random_importance(n_in: int = 256) -> dict[str, Float32Array]:
    rng = np.random.default_rng(0)
    names = ("blk.1.ffn_down.weight", "blk.0.attn_q.weight", "output.weight")
    return {name: np.exp(rng.normal(0, 4, n_in)).astype(np.float32) for name in names}


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    """Both formats keep every column to one rounding, and say what it was made of."""
    path = tmp_path / f"imatrix.{suffix}"
    importance = random_importance()
    write_imatrix(path, importance, n_tokens=100_000, dataset="words")
    imatrix = read_imatrix(path)
    assert imatrix.importance.keys() == importance.keys()
    for name, values in importance.items():
        np.testing.assert_allclose(imatrix.importance[name], values, rtol=1.2e-7)
    assert imatrix.datasets == ("words",)
    assert imatrix.n_chunks == 196
    assert len(imatrix.digest) == 64
    with pytest.raises(OutputExistsError, match="--force"):
        write_imatrix(path, importance, n_tokens=1, dataset="")


def test_gguf_layout_is_llama_cpps(tmp_path: Path) -> None:
    """The gguf package finds the keys and tensors that llama-imatrix writes, in its order."""
    path = tmp_path / "imatrix.gguf"
    importance = random_importance()
    write_imatrix(path, importance, n_tokens=1000, dataset="words")
    reader = GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    del keys["GGUF.version"], keys["GGUF.tensor_count"], keys["GGUF.kv_count"]
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["words"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    names = [f"{name}.{part}" for name in sorted(importance) for part in ("in_sum2", "counts")]
    assert [tensor.name for tensor in reader.tensors] == names
    for sums, counts in zip(reader.tensors[::2], reader.tensors[1::2], strict=True):
        expected = importance[sums.name.removesuffix(".in_sum2")] * np.float32(1000)
        np.testing.assert_array_equal(sums.data, expected)
        assert counts.data.tolist() == [1000.0]


def test_legacy_layout_is_llama_cpps(tmp_path: Path) -> None:
    """A file packed by hand, field by field, is what the writer writes."""
    path = tmp_path / "imatrix.dat"
    values = np.array([1.5, 0.25, 3.0], dtype=np.float32)
    write_imatrix(path, {"output.weight": values}, n_tokens=1000, dataset="words")
    expected = struct.pack("<ii13sii", 1, 13, b"output.weight", 2, 3)
    expected += struct.pack("<3f", 3.0, 0.5, 6.0) + struct.pack("<ii5s", 2, 5, b"words")
    assert path.read_bytes() == expected


def test_gguf_sums_are_divided_by_their_counts(tmp_path: Path) -> None:
    """Each matrix of a tensor has its own count; one that saw no token counts as 1 everywhere."""
    writer = GGUFWriter(tmp_path / "i.gguf", "")
    sums = np.array([[2, 4], [9, 9], [3, 6]], dtype=np.float32)
    writer.add_tensor("x.in_sum2", sums)
    writer.add_tensor("x.counts", np.array([[2], [0], [3]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    imatrix = read_imatrix(tmp_path / "i.gguf")
    assert imatrix.importance["x"].tolist() == [1, 2, 1, 1, 1, 2]
    assert imatrix.counts == {"x": 3}


def test_legacy_without_its_tail(tmp_path: Path) -> None:
    """The oldest files end after the last entry, and 0 calls mean that the sums stand."""
    path = tmp_path / "old.dat"
    path.write_bytes(struct.pack("<ii1siiff", 1, 1, b"x", 0, 2, 0.5, 2.0))
    imatrix = read_imatrix(path)
    assert imatrix.importance["x"].tolist() == [0.5, 2.0]
    assert (imatrix.n_chunks, imatrix.datasets) == (0, ())


def test_how_an_imatrix_fits_a_model(model: Qwen2Config) -> None:
    """Matched, missing and foreign entries are told apart; zeros and NaN are counted by tensor."""
    importance = {
        spec.gguf_name: np.ones(spec.shape[-1], dtype=np.float32)
        for spec in tensor_specs(model)
        if len(spec.shape) > 1 and spec.layer_index is not None
    }
    importance["blk.0.attn_q.weight"][3:5] = 0
    importance["blk.0.attn_k.weight"][[1, 2, 3]] = np.nan, -1, np.inf
    importance["blk.7.attn_q.weight"] = np.ones(256, dtype=np.float32)
    match = match_imatrix(Imatrix(importance, {}, 1, 512, (), ""), model)
    assert len(match.matched) == 7
    assert match.missing == ("token_embd.weight", "output.weight")
    assert match.unused == ("blk.7.attn_q.weight",)
    assert match.zeros == {"blk.0.attn_q.weight": 2}
    assert match.unusable == {"blk.0.attn_k.weight": 3}
    assert match.lines() == [
        "imatrix: 7 entries match",
        "imatrix: no entry for token_embd.weight, output.weight",
        "imatrix: entries that are not of this model: blk.7.attn_q.weight",
        "imatrix: columns of importance 0, rounded without care, in blk.0.attn_q.weight (2)",
        "imatrix: columns that are NaN, infinite or negative in blk.0.attn_k.weight (3)",
    ]
    assert match.lines(1)[1] == "imatrix: no entry for token_embd.weight and 1 more"


def test_an_imatrix_of_another_width(model: Qwen2Config) -> None:
    """Columns of another number are refused; for the embeddings alone llama.cpp leaves them out."""
    short = np.ones(128, dtype=np.float32)
    imatrix = Imatrix({"token_embd.weight": short}, {}, 1, 512, (), "")
    assert "token_embd.weight" in match_imatrix(imatrix, model).missing
    imatrix = Imatrix({"blk.0.ffn_up.weight": short}, {}, 1, 512, (), "")
    with pytest.raises(QwqError, match=r"ffn_up\.weight: the imatrix has 128 columns .+ 256; give"):
        match_imatrix(imatrix, model)


def write_pair(path: Path, **tensors: Float32Array) -> None:
    writer = GGUFWriter(path, "")
    for name, values in tensors.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


F32 = np.float32
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a model": (
        lambda path: write_pair(path, output__weight=np.ones(4, F32)),
        "output.weight has not both sums and counts",
    ),
    "no counts": (
        lambda path: write_pair(path, x__in_sum2=np.ones(4, F32)),
        "x has not both sums and counts",
    ),
    "half precision": (
        lambda path: write_pair(path, x__in_sum2=np.ones(4, np.float16), x__counts=np.ones(1, F32)),
        "x.in_sum2 is F16, not F32",
    ),
    "three counts for four columns": (
        lambda path: write_pair(path, x__in_sum2=np.ones(4, F32), x__counts=np.ones(3, F32)),
        "x has odd counts",
    ),
    "a count that is no number": (
        lambda path: write_pair(
            path, x__in_sum2=np.ones(4, F32), x__counts=np.full(1, np.nan, F32)
        ),
        "x has odd counts",
    ),
    "nothing": (lambda path: write_pair(path), "holds no importance"),
    "an empty file": (lambda path: path.write_bytes(b""), "4 bytes are announced and 0 are left"),
    "no entries": (lambda path: path.write_bytes(bytes(4)), "number of entries is 0"),
    "an entry twice": (
        lambda path: path.write_bytes(
            struct.pack("<i", 2) + 2 * struct.pack("<i1siif", 1, b"x", 1, 1, 1.0)
        ),
        "x occurs twice",
    ),
    "a cut name": (
        lambda path: path.write_bytes(struct.pack("<ii", 1, 99) + b"x"),
        "99 bytes are announced and 1 are left",
    ),
    "a negative length": (
        lambda path: path.write_bytes(struct.pack("<ii", 1, -1)),
        "bytes of a name is -1",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    """What is no imatrix, or only a part of one, is refused with what is wrong."""
    make, problem = BAD_FILES[name]
    make(tmp_path / "i.dat")
    with pytest.raises(QwqError, match=problem):
        read_imatrix(tmp_path / "i.dat")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is an error that says so."""
    with pytest.raises(QwqError, match="cannot be read"):
        read_imatrix(tmp_path / "none.gguf")


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_every_prefix_is_refused_or_whole(tmp_path: Path, suffix: str) -> None:
    """A file cut anywhere ends in a typed error, except where only the optional tail is lost."""
    path = tmp_path / f"i.{suffix}"
    write_imatrix(path, {"x": np.ones(3, F32)}, n_tokens=5, dataset="d")
    data = path.read_bytes()
    whole = struct.pack("<ii1sii", 1, 1, b"x", 1, 3) + np.ones(3, F32).tobytes()
    tails = {len(whole), len(whole) + 4} if suffix == "dat" else set()
    padding = {len(data) - i for i in range(1, 29)} if suffix == "gguf" else set()
    for length in range(len(data)):
        if length in tails | padding:
            continue
        path.write_bytes(data[:length])
        with pytest.raises((QwqError, GgufError)):
            read_imatrix(path)


@given(st.binary(max_size=200), st.booleans())
def test_hostile_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, one: bool) -> None:
    """Whatever the bytes, reading ends with an imatrix or a typed error, never otherwise."""
    path = tmp_path_factory.getbasetemp() / "hostile.dat"
    path.write_bytes((struct.pack("<ii1s", 1, 1, b"x") if one else b"") + data)
    with suppress(QwqError):
        read_imatrix(path)
