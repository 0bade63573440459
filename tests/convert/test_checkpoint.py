"""A checkpoint is read exactly, and every defect is an error with a name."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.checkpoint import Checkpoint, read_safetensors_header
from convert.errors import CheckpointError
from tests.synthetic import CONFIG, Array, write_checkpoint, write_safetensors

EMBEDDING = "model.embed_tokens.weight"
V_PROJ = "model.layers.0.self_attn.v_proj.weight"
ONE_LAYER = {"num_hidden_layers": 1, "max_window_layers": 1}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rows_equal_the_safetensors_package(tmp_path: Path, dtype: str) -> None:
    """Every value of every dtype, whole and by slices: catches a wrong offset or widening."""
    from safetensors.torch import load_file

    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, dtype=dtype)
    expected = load_file(folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            whole = checkpoint.read(name)
            np.testing.assert_array_equal(whole, tensor.float().numpy())
            n_rows = len(whole)
            slices = [checkpoint.rows(name, i, min(i + 7, n_rows)) for i in range(0, n_rows, 7)]
            np.testing.assert_array_equal(np.concatenate(slices), whole)
            assert checkpoint.rows(name, 3, 3).shape == (0, *whole.shape[1:])


def test_shards_equal_one_file(tmp_path: Path) -> None:
    """The same seed in one file and in five shards reads the same."""
    one = write_checkpoint(tmp_path / "one", config=ONE_LAYER)
    five = write_checkpoint(tmp_path / "five", config=ONE_LAYER, n_shards=5)
    with Checkpoint.open(one) as a, Checkpoint.open(five) as b:
        assert len({info.path for info in b.tensors.values()}) == 5
        for name in a.tensors:
            np.testing.assert_array_equal(a.read(name), b.read(name))


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    """Tied: no lm_head asked for, and one that is there anyway does no harm."""
    tied = ONE_LAYER | {"tie_word_embeddings": True}
    folder = write_checkpoint(tmp_path / "c", config=tied)
    with Checkpoint.open(folder) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors

    def add_head(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].copy()

    Checkpoint.open(write_checkpoint(tmp_path / "d", config=tied, edit=add_head)).close()

    def add_another_head(tensors: dict[str, Array]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING] * np.float32(2)

    another = write_checkpoint(tmp_path / "e", config=tied, edit=add_another_head)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model\.embed_tokens"):
        Checkpoint.open(another)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def drop(name: str) -> Callable[[dict[str, Array]], None]:
    def edit(tensors: dict[str, Array]) -> None:
        del tensors[name]

    return edit


def transpose_down(tensors: dict[str, Array]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)


def add_lora(tensors: dict[str, Array]) -> None:
    for part, shape in (("A", (4, 256)), ("B", (256, 4))):
        name = f"model.layers.0.self_attn.q_proj.lora_{part}.default.weight"
        tensors[name] = np.zeros(shape, np.float32)


def wrap_in_an_adapter(tensors: dict[str, Array]) -> None:
    """As peft saves a model that was never merged: all names change, some gain a base_layer."""
    for name in list(tensors):
        wrapped = f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer.")
        tensors[wrapped] = tensors.pop(name)


def add_layer(tensors: dict[str, Array]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((512, 256), np.float32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("model.norm.weight"), r"model\.norm\.weight is missing, of shape \[256\]; "),
        (drop("lm_head.weight"), r"lm_head\.weight is missing, of shape \[320, 256\]; "),
        (transpose_down, r"down_proj\.weight has shape \[512, 256\] .+ \[256, 512\]; "),
        (add_lora, r"2 tensors are left over from a LoRA adapter \(.+lora_A\.default.+, .+lora_B"),
        (
            wrap_in_an_adapter,
            r"2 tensors are left over .+base_layer\.bias.+; merge it into",
        ),
        (add_layer, r"1 tensors do not belong to 1 Qwen2 layers \(model\.layers\.1\..+\); remove "),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, edit: Callable[[dict[str, Array]], None], message: str
) -> None:
    """Missing, misshapen and extra tensors are named before any weight is read."""
    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, edit=edit)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architecture is LlamaForCausalLM and Qwen2F"),
        ({"architectures": None}, "architecture is none and Qwen2ForCausalLM is needed"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"hidden_size": "256"}, "hidden_size is '256', not a whole number"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776, not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_key_value_heads": 3}, "8 attention heads do not share 3 key heads evenly"),
        ({"num_attention_heads": 6}, "256 does not divide by 6 heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, not a positive number"),
        ({"rope_theta": "nan"}, "rope_theta is 'nan'"),
        ({"rope_scaling": 4}, "rope_scaling is 4, not a table"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope type 'ntk' is not one of"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0, neither true nor false"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True, "max_window_layers": 0}, "sliding windows start at layer 0"),
    ],
)
def test_config_values(small: Path, change: dict[str, object], message: str) -> None:
    """A config.json of another architecture, or with odd values, is named with the key."""
    edit_json(small / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        Checkpoint.open(small)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "rms_norm_eps", "rope_theta"])
def test_config_keys_that_are_missing(small: Path, key: str) -> None:
    """No size has a silent default."""
    edit_json(small / "config.json", lambda config: config.pop(key))
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        Checkpoint.open(small)


def test_both_spellings_of_rope(small: Path) -> None:
    """rope_parameters and the older two keys mean the same."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    edit_json(small / "config.json", lambda config: config.update(rope_scaling=yarn))
    with Checkpoint.open(small) as checkpoint:
        old = checkpoint.model
    new_spelling = {"rope_theta": 1e6, "rope_type": "yarn"} | {k: yarn[k] for k in list(yarn)[1:]}

    def respell(config: dict[str, Any]) -> None:
        del config["rope_theta"], config["rope_scaling"]
        config["rope_parameters"] = new_spelling

    edit_json(small / "config.json", respell)
    with Checkpoint.open(small) as checkpoint:
        assert checkpoint.model == old
    assert old.rope_scaling is not None
    assert (old.rope_scaling.factor, old.rope_scaling.original_context_length) == (4.0, 32768)


def test_no_checkpoint(tmp_path: Path) -> None:
    """An empty folder, a folder that is absent, and a config without weights."""
    with pytest.raises(CheckpointError, match=r"holds no config\.json, so it is no checkpoint; "):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safe"):
        Checkpoint.open(tmp_path)


def test_what_lies_in_the_folder(small: Path) -> None:
    """A LoRA adapter is no model, nor is it left out in silence; *.bin files are not read."""
    (small / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds adapter_config\.json, a LoRA adapter; merge"):
        Checkpoint.open(small)
    (small / "adapter_config.json").unlink()
    for path in [*small.glob("*.safetensors"), small / "model.safetensors.index.json"]:
        path.unlink()
    (small / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"holds neither .+; fetch it as safetensors: "):
        Checkpoint.open(small)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000, b"1" * 9000]
)
def test_config_that_is_no_json(small: Path, text: bytes) -> None:
    """Text that is no JSON object, nested without end, or with a key twice."""
    (small / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json: no (valid JSON|JSON object)"):
        Checkpoint.open(small)


def test_missing_shard(small: Path) -> None:
    """The shard's name is in the message."""
    (small / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: the shard is m"):
        Checkpoint.open(small)


def test_truncated_shard(small: Path) -> None:
    """Both sizes are in the message."""
    shard = small / "model-00003-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1000])
    with pytest.raises(
        CheckpointError,
        match=rf"00003\.safetensors: its tensors end at byte {len(data):,} and the file at "
        rf"{len(data) - 1000:,}; ",
    ):
        Checkpoint.open(small)


def test_shard_that_shrinks_while_it_is_read(small: Path) -> None:
    """Truncation after opening is an error too, not a crash of the process."""
    with Checkpoint.open(small) as checkpoint:
        info = max(checkpoint.tensors.values(), key=lambda info: info.offset)
        info.path.write_bytes(info.path.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=f"{info.name} ends 10 bytes early"):
            checkpoint.read(info.name)


def test_index_and_shards_that_disagree(small: Path) -> None:
    """A tensor the index places elsewhere, one it does not know, and a path that is no name."""
    index = small / "model.safetensors.index.json"
    original = index.read_text()
    shard = "model-00001-of-00003.safetensors"

    def swap(table: dict[str, Any]) -> None:
        name = next(n for n, s in table["weight_map"].items() if s != shard)
        table["weight_map"][name] = shard

    edit_json(index, swap)
    with pytest.raises(CheckpointError, match=r"which the index places"):
        Checkpoint.open(small)
    for hostile in ("../../etc/passwd", "/etc/passwd.safetensors", "..", 7):
        table = json.loads(original)
        table["weight_map"][EMBEDDING] = hostile
        index.write_text(json.dumps(table))
        with pytest.raises(CheckpointError, match=f"{EMBEDDING} is said to be in"):
            Checkpoint.open(small)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    """NaN and Inf are found when their rows are read, and named with their position."""

    def spoil(tensors: dict[str, Array]) -> None:
        tensors[V_PROJ][5, 17] = value

    folder = write_checkpoint(tmp_path / "c", config=ONE_LAYER, edit=spoil)
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.rows(V_PROJ, 0, 5)
        checkpoint.rows(V_PROJ, 6, 64)
        with pytest.raises(CheckpointError, match=r"v_proj\.weight holds -?(nan|inf) at \[5, 17\]"):
            checkpoint.rows(V_PROJ, 4, 8)


def one_tensor_file(path: Path, header: bytes, n_data: int) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_data))
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [2, 3], "data_offsets": [0, 12]}, "lacks dtype, shape or data_offsets"),
        ({"dtype": "I8", "shape": [12], "data_offsets": [0, 12]}, "is of dtype I8"),
        ({"dtype": "BF16", "shape": [2, 4], "data_offsets": [0, 12]}, "takes 16 bytes .+ has 12"),
        ({"dtype": "BF16", "shape": [-2, -3], "data_offsets": [0, 12]}, "shape or byte range"),
        ({"dtype": "BF16", "shape": [2.0, 3], "data_offsets": [0, 12]}, "shape or byte range"),
        ({"dtype": "BF16", "shape": [6], "data_offsets": [12, 0]}, "takes 12 bytes .+ has -12"),
        ({"dtype": "BF16", "shape": [6], "data_offsets": [4, 16]}, "starts at byte"),
        ({"dtype": "BF16", "shape": [7], "data_offsets": [0, 14]}, "its tensors end at byte"),
        ({"dtype": "BF16", "shape": [1 << 61, 8], "data_offsets": [0, 12]}, "takes"),
        ({"dtype": "BF16", "shape": [1 << 70], "data_offsets": [0, 12]}, "shape or byte range"),
        ({"dtype": "BF16", "shape": [1] * 9, "data_offsets": [0, 2]}, "shape or byte range"),
    ],
)
def test_hostile_entries(tmp_path: Path, entry: dict[str, object], message: str) -> None:
    """Each field of a header entry is held against the others and the file's size."""
    path = one_tensor_file(tmp_path / "x.safetensors", json.dumps({"t": entry}).encode(), 12)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{message}"):
        list(read_safetensors_header(path))


def test_hostile_header_length(tmp_path: Path) -> None:
    """A length beyond the file or the format's limit is refused before it is read."""
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="claims 4,611,686,018,427,387,904 bytes and 2 are"):
        list(read_safetensors_header(path))
    path.write_bytes(b"12")
    with pytest.raises(CheckpointError, match="2 bytes are no safetensors file"):
        list(read_safetensors_header(path))


def test_overlap(tmp_path: Path) -> None:
    """Two tensors that share bytes."""
    entries = {
        "a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [4, 12]},
    }
    path = one_tensor_file(tmp_path / "x.safetensors", json.dumps(entries).encode(), 12)
    with pytest.raises(CheckpointError, match=r"b starts at byte .+ and the tensor before it ends"):
        list(read_safetensors_header(path))


@pytest.fixture(scope="module")
def shard_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    tensors = {"one": np.ones((3, 4), np.float32), "two": np.ones(5, np.float32)}
    write_safetensors(path, tensors, "BF16")
    return path.read_bytes()


def test_every_prefix_is_refused(tmp_path: Path, shard_bytes: bytes) -> None:
    """A shard that is cut anywhere, by one byte or all, never passes."""
    path = tmp_path / "x.safetensors"
    for length in range(len(shard_bytes)):
        path.write_bytes(shard_bytes[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            list(read_safetensors_header(path))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage(tmp_path: Path, shard_bytes: bytes, data: st.DataObject) -> None:
    """Any bytes changed or inserted: tensors inside the file, or a CheckpointError, in memory."""
    mutated = bytearray(shard_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(mutated) - 1))
        new = data.draw(
            st.sampled_from([b'"', b"{", b"9", b"-1", b"[", b"]", b",", b"\0", b"\xff"])
        )
        mutated[where : where + data.draw(st.integers(0, 1))] = new
    path = tmp_path / "x.safetensors"
    path.write_bytes(mutated)
    tracemalloc.start()
    try:
        for info in read_safetensors_header(path):
            assert info.offset + info.nbytes <= len(mutated)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20
