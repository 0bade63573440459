"""A GGUF header is believed only where the file's size allows it."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.encode import QuantType
from convert.errors import GgufError
from convert.gguf_header import GgufHeader, read_header


def wider_numbers(
    writer: gguf.GGUFWriter,
) -> dict[str, tuple[Callable[[str, Any], None], int | float]]:
    """One number of every type, such that a wrong width or sign shows."""
    return {
        "n.uint8": (writer.add_uint8, 200),
        "n.int8": (writer.add_int8, -3),
        "n.uint16": (writer.add_uint16, 60_000),
        "n.int16": (writer.add_int16, -300),
        "n.int32": (writer.add_int32, -70_000),
        "n.uint64": (writer.add_uint64, (1 << 64) - 1),
        "n.int64": (writer.add_int64, -(1 << 40)),
        "n.float64": (writer.add_float64, 0.1),
    }


def write_small(path: Path) -> bytes:
    """A file with every kind of value and two tensors, written by the gguf package."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_string("general.name", "näno")
    writer.add_uint32("a.uint", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    for key, (add, value) in wider_numbers(writer).items():
        add(key, value)
    writer.add_array("a.strings", ["x", "", "yz"])
    writer.add_array("a.floats", [1.5, 2.5])
    writer.add_tensor("one.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    blocks = np.zeros((2, 34), dtype=np.uint8)
    writer.add_tensor("two.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_small(tmp_path_factory.mktemp("gguf") / "small.gguf")


def read_bytes(folder: Path, data: bytes) -> GgufHeader:
    path = folder / "mutated.gguf"
    path.write_bytes(data)
    return read_header(path)


def test_reads_what_the_gguf_package_wrote(tmp_path: Path, small: bytes) -> None:
    """Values, shapes, types and offsets equal the package's: catches a wrong width or order."""
    header = read_bytes(tmp_path, small)
    assert header.metadata["general.name"] == "näno"
    assert header.metadata["a.uint"] == 7
    for key, (_, value) in wider_numbers(gguf.GGUFWriter(None, "qwen2")).items():
        assert header.metadata[key] == value, key
    assert header.metadata["a.float"] == 0.5
    assert header.metadata["a.bool"] is True
    assert header.metadata["a.strings"] == ["x", "", "yz"]
    np.testing.assert_array_equal(header.metadata["a.floats"], [1.5, 2.5])
    one, two = header.tensors["one.weight"], header.tensors["two.weight"]
    assert (one.shape, one.quant_type) == ((3, 4), QuantType.F32)
    assert (two.shape, two.quant_type, two.nbytes) == ((2, 32), QuantType.Q8_0, 68)
    reader = gguf.GGUFReader(tmp_path / "mutated.gguf")
    assert [t.data_offset for t in reader.tensors] == [one.offset, two.offset]


def test_every_prefix_is_refused(tmp_path: Path, small: bytes) -> None:
    """A cut file never passes, wherever it is cut, up to the last tensor's last byte."""
    header = read_bytes(tmp_path, small)
    last = header.tensors["two.weight"]
    for length in range(last.offset + last.nbytes):
        with pytest.raises(GgufError, match=r"mutated\.gguf: .+; "):
            read_bytes(tmp_path, small[:length])


def test_no_gguf(tmp_path: Path) -> None:
    """Another file, an empty file, a folder and nothing at all are named for what they are."""
    with pytest.raises(GgufError, match="starts with b'PK"):
        read_bytes(tmp_path, b"PK\3\4" + bytes(100))
    with pytest.raises(GgufError, match="starts with b''"):
        read_bytes(tmp_path, b"")
    with pytest.raises(GgufError, match="cannot be read"):
        read_header(tmp_path)
    with pytest.raises(GgufError, match="cannot be read"):
        read_header(tmp_path / "absent.gguf")


def field_offset(data: bytes, text: bytes) -> int:
    """Where the value after the string `text` starts."""
    return data.index(struct.pack("<Q", len(text)) + text) + 8 + len(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 1, "at byte 4 the version is 1"),
        ("n_tensors", 1 << 60, "at byte 8 1,152,921,504,606,846,976 tensors are announced"),
        ("n_keys", 1 << 40, "at byte 16 1,099,511,627,776 keys are announced"),
        ("key_length", 1 << 50, "at byte 24 a key of"),
        ("string_length", 1 << 62, "a value of"),
        ("strings_count", 1 << 61, "strings are announced"),
        ("value_type", 99, "the value type 99 is unknown"),
        ("array_type", 9, "the array type 9 is unknown"),
        ("n_dims", 5, "one.weight has 5 dimensions"),
        ("columns", 1 << 63, "one.weight of shape"),
        ("columns", 0, "one.weight of shape"),
        ("tensor_type", 4, "one.weight has the unknown type 4"),
        ("tensor_type", 12, "one.weight has rows of 4 in blocks of 256"),
        ("tensor_offset", 32, "one.weight is said to start at 32 and must at 0"),
    ],
)
def test_hostile_fields(tmp_path: Path, small: bytes, field: str, value: int, message: str) -> None:
    """Each field that sizes or places something is refused with its offset."""
    tensor = field_offset(small, b"one.weight")
    where, width = {
        "version": (4, 4),
        "n_tensors": (8, 8),
        "n_keys": (16, 8),
        "key_length": (24, 8),
        "string_length": (field_offset(small, b"general.name") + 4, 8),
        "strings_count": (field_offset(small, b"a.strings") + 8, 8),
        "value_type": (field_offset(small, b"a.uint"), 4),
        "array_type": (field_offset(small, b"a.strings") + 4, 4),
        "n_dims": (tensor, 4),
        "columns": (tensor + 4, 8),
        "tensor_type": (tensor + 20, 4),
        "tensor_offset": (tensor + 24, 8),
    }[field]
    mutated = small[:where] + value.to_bytes(width, "little") + small[where + width :]
    with pytest.raises(GgufError, match=message):
        read_bytes(tmp_path, mutated)


def test_a_name_may_not_occur_twice(tmp_path: Path, small: bytes) -> None:
    """A second tensor or key of the same name would hide the first."""
    with pytest.raises(GgufError, match=r"the tensor one\.weight occurs twice"):
        read_bytes(tmp_path, small.replace(b"two.weight", b"one.weight"))
    with pytest.raises(GgufError, match=r"'a\.uint' is empty or occurs twice"):
        read_bytes(tmp_path, small.replace(b"a.bool", b"a.uint"))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage(tmp_path: Path, small: bytes, data: st.DataObject) -> None:
    """Any bytes changed: a header or a GgufError, in little memory, and never anything else."""
    mutated = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(small) - 1))
        mutated[where] = data.draw(st.integers(0, 255))
    tracemalloc.start()
    try:
        header = read_bytes(tmp_path, bytes(mutated))
        assert all(t.offset + t.nbytes <= header.file_nbytes for t in header.tensors.values())
    except GgufError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
