"""`qwq inspect` and `qwq verify` as a user meets them, and what they warn of."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.checkpoint import Checkpoint
from convert.errors import GgufError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from convert.gguf_parts import read_model
from convert.inspection import json_value, printable, shown_value, types_by_layer, warnings_of
from convert.verify import verify_model
from qwq_local.cli import main
from tests.synthetic import CHAT_TEMPLATE, write_checkpoint

Keys = dict[str, object]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    path = tmp_path_factory.mktemp("files") / "tiny-Q4_K_M.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q4_K_M", path)
    return path


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of the program in this process."""
    monkeypatch.setattr("sys.argv", ["qwq", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int | None)
    return stopped.value.code or 0, captured.out, captured.err


Qwq = Callable[..., tuple[int, str, str]]


@pytest.fixture
def qwq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Qwq:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def test_inspect(qwq: Qwq, file: Path) -> None:
    """Sizes by type, types by layer, keys and the verdict on stdout, nothing on stderr."""
    code, out, err = qwq("inspect", file)
    assert (code, err) == (0, "")
    assert "99 tensors" in out
    assert "blk" not in out.split("general.")[0]
    assert "Q6_K 0, 3, 6-7" in out
    assert "qwen2.rope.freq_base" in out
    assert "warnings: none" in out


def test_inspect_as_json(qwq: Qwq, file: Path) -> None:
    """One document; its bytes by type add up to the tensors, long lists are lengths."""
    code, out, err = qwq("inspect", file, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    tensors = read_header(file).tensors
    assert sum(share["nbytes"] for share in document["types"]) == sum(
        tensor.nbytes for tensor in tensors.values()
    )
    assert document["metadata"]["general.sampling.temp"] == 0.6
    assert document["metadata"]["tokenizer.ggml.tokens"] == {"length": 320}
    assert document["metadata"]["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert document["types_by_layer"]["attn_q.weight"] == "Q4_K"
    assert document["nbytes"] == file.stat().st_size
    assert document["warnings"] == []


def test_types_by_layer(file: Path) -> None:
    """Every tensor's type can be read off the map."""
    described = types_by_layer(read_model(file))
    for name, tensor in read_header(file).tensors.items():
        prefix, _, role = name.partition(".")
        if prefix != "blk":
            assert described[name] == tensor.quant_type.name
            continue
        layer, _, role = role.partition(".")
        stated: dict[int, str] = {}
        for part in described[role].split("; "):
            type_name, _, ranges = part.partition(" ")
            for one in ranges.split(", ") if ranges else ["0-7"]:
                first, _, last = one.partition("-")
                stated |= dict.fromkeys(range(int(first), int(last or first) + 1), type_name)
        assert stated[int(layer)] == tensor.quant_type.name, name


def test_verify(qwq: Qwq, file: Path, folder: Path) -> None:
    """Sound with and without the source, which adds errors by type."""
    code, out, err = qwq("verify", file)
    assert (code, err) == (0, "")
    assert f"{file}: sound, 99 tensors" in out
    assert "no --source was given" in out
    code, out, err = qwq("verify", file, "--source", folder, "--threads", "1")
    assert (code, err) == (0, "")
    assert "Q6_K" in out
    code, out, err = qwq("verify", file, "--source", folder, "--json", "-q")
    document = json.loads(out)
    assert (code, err, document["sound"], len(document["tensors"])) == (0, "", True, 99)
    assert 0 < document["tensors"][0]["relative_error"] < 0.1


def test_verify_names_the_first_wrong_tensor(qwq: Qwq, file: Path, tmp_path: Path) -> None:
    """One line with the remedy for the first, exit code 1; the others after it, and in the JSON."""
    data = bytearray(file.read_bytes())
    tensors = read_header(file).tensors
    for name in ("blk.2.ffn_up.weight", "output.weight"):
        data[tensors[name].offset] ^= 1
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    code, out, err = qwq("verify", path, "--json", "-q")
    assert code == 1
    assert err.startswith(f"error: {path}: blk.2.ffn_up.weight has the SHA-256 ")
    assert (err.count("\n"), "; fetch or make the file again" in err) == (1, True)
    wrong = [tensor["name"] for tensor in json.loads(out)["tensors"] if tensor["problem"]]
    assert wrong == ["blk.2.ffn_up.weight", "output.weight"]
    code, out, err = qwq("verify", path)
    assert (code, out) == (1, "")
    assert f"also {path}: output.weight" in err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_gguf(qwq: Qwq, command: str, tmp_path: Path, folder: Path) -> None:
    """A checkpoint's shard, a folder and nothing at all: one line, exit code 1."""
    for path in (folder / "model.safetensors", folder, tmp_path / "absent.gguf"):
        code, out, err = qwq(command, path)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"error: {path}: ")


def test_help_teaches(qwq: Qwq) -> None:
    for command in ("inspect", "verify"):
        code, out, _err = qwq(command, "--help")
        assert code == 0
        assert f"Example: qwq {command} " in " ".join(out.split())


TOKENS = ["a", "b", "<|endoftext|>", "<|im_end|>", "<think>"]
SOUND: Keys = {
    "qwen2.context_length": 32768,
    "qwen2.block_count": 2,
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1, 1, 3, 3, 4],
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": CHAT_TEMPLATE,
    "general.sampling.temp": 0.6,
}
YARN: Keys = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
ORIGINAL = "qwen2.rope.scaling.original_context_length"
QWEN25_TEMPLATE = CHAT_TEMPLATE.replace("<think>\n", "")


def described_file(path: Path, keys: Keys, *, without_tensor: str = "") -> Path:
    """A header with these keys and two layers of one tensor each."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name in ("token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"):
        if name != without_tensor:
            writer.add_tensor(name, np.ones((5, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"tokenizer.chat_template": QWEN25_TEMPLATE}, "does not open the thought: there is no"),
        ({"tokenizer.chat_template": None}, "it has no chat template"),
        ({"tokenizer.chat_template": CHAT_TEMPLATE + "{{ enable_thinking }}"}, "enable_thinking"),
        ({"tokenizer.ggml.eos_token_id": 2}, "its eos token is 2 <|endoftext|> and its template"),
        ({"tokenizer.ggml.eos_token_id": 9}, "its eos token is 9 of 5 tokens"),
        ({"tokenizer.ggml.eos_token_id": None}, "its eos token is None of 5 tokens"),
        ({"qwen2.context_length": 131072}, "length of 131,072 says nothing about rope"),
        (YARN | {ORIGINAL: 131072}, "scaled from a length of 131072 and QwQ's is 32768"),
        (YARN, "scaled from a length of None"),
        (YARN | {ORIGINAL: 32768, "qwen2.context_length": 131072}, "scaled at every length"),
        ({"tokenizer.ggml.add_bos_token": True}, "it asks for a bos token"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "its pre-tokenizer is llama-bpe and not qwen2"),
        ({"tokenizer.ggml.pre": None}, "its pre-tokenizer is missing"),
        ({"tokenizer.ggml.token_type": [1, 1, 3, 1, 4]}, "<|im_end|> is no control token"),
        ({"tokenizer.ggml.token_type": [1, 1, 3, 3, 3]}, "<think> is a control token in it"),
        ({"tokenizer.ggml.tokens": None}, "it has no tokenizer"),
        ({"general.sampling.temp": None}, "it has no sampling defaults"),
        ({"qwen2.block_count": 3}, "layer 2 lacks attn_q.weight: no program will load it"),
    ],
)
def test_warnings(tmp_path: Path, change: Keys, warning: str) -> None:
    """Each fault of files in the wild gives its one warning, and a sound file none."""
    assert warnings_of(read_model(described_file(tmp_path / "sound.gguf", SOUND))) == []
    path = described_file(tmp_path / "x.gguf", SOUND | change)
    (found,) = warnings_of(read_model(path))
    assert warning in found


def test_a_missing_layer_and_missing_tokens(tmp_path: Path) -> None:
    """Tensors that are not there, and embeddings that do not fit the tokenizer."""
    path = described_file(tmp_path / "x.gguf", SOUND, without_tensor="blk.1.attn_q.weight")
    assert warnings_of(read_model(path)) == ["layer 1 lacks attn_q.weight: no program will load it"]
    fewer = SOUND | {
        "tokenizer.ggml.tokens": TOKENS[:4],
        "tokenizer.ggml.token_type": [1, 1, 3, 3],
    }
    (found,) = warnings_of(read_model(described_file(tmp_path / "y.gguf", fewer)))
    assert "it has 4 tokens and 5 rows of embeddings" in found


def test_a_vocabulary_alone(qwq: Qwq, tmp_path: Path) -> None:
    """A file without tensors has no bits per weight, and says that it lacks its layers."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, _err = qwq("inspect", tmp_path / "x.gguf")
    assert code == 0
    assert "0 tensors\n" in out
    assert "warning: it holds no tensors of its 2 layers" in out
    document = json.loads(qwq("inspect", tmp_path / "x.gguf", "--json")[1])
    assert document["bits_per_weight"] is None


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_damage(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes changed anywhere: all is shown, verified and written as JSON, or a GgufError."""
    sound = described_file(tmp_path / "sound.gguf", SOUND | YARN).read_bytes()
    mutated = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.integers(0, len(sound) - 1))
        mutated[where] = data.draw(st.sampled_from([0, 1, 2, 5, 8, 9, 127, 255]))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(mutated)
    try:
        model = read_model(path)
        warnings_of(model)
        types_by_layer(model)
        shown = [shown_value(value) for value in model.metadata.values()]
        assert all(text.isprintable() for text in shown)
        json.dumps([json_value(value) for value in model.metadata.values()], allow_nan=False)
        list(verify_model(path, threads=1))
    except GgufError:
        pass


def test_text_that_a_terminal_would_obey(qwq: Qwq, tmp_path: Path) -> None:
    """Escapes, markup and bytes that are no UTF-8 are shown, not obeyed."""
    assert printable("a\x1b[31m\udcffé") == "a\\x1b[31m\\udcffé"
    path = described_file(tmp_path / "x.gguf", SOUND | {"general.name": "\x1b]0;x\x07[bold]" + "€"})
    data = path.read_bytes()
    path.write_bytes(data.replace("€".encode(), b"\xff\xfe\xfd"))
    code, out, _err = qwq("inspect", path)
    assert code == 0
    assert "\\x1b]0;x\\x07[bold]\\udcff" in out
    assert "\x1b" not in out
    assert qwq("inspect", path, "--json")[0] == 0
