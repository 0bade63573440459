"""Parity on the checkpoint's own files, on those of others, and on what got something wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.errors import GgufError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from quant_eval import parity_rope
from quant_eval.nano import CHECKPOINT
from quant_eval.parity import check_parity
from quant_eval.parity_sampling import SEQUENCE
from qwq_local.engines import gguf as gguf_engine
from qwq_local.engines.transformers import TransformersEngine
from qwq_local.rope import Yarn
from qwq_local.sampling import Sampling
from tests.converter_cases import GOLDEN, comparable, write_case
from tests.quant_eval.test_verdict_cli import run
from tests.real_shapes import CONFIG as REAL_CONFIG
from tests.synthetic import write_checkpoint, write_gptq

ONE_LAYER = {"num_hidden_layers": 1}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
Edit = Callable[[dict[str, Any]], object]


def failed(path: Path, source: Path) -> dict[str, str]:
    with Checkpoint.open(source) as checkpoint:
        checks = list(check_parity(path, checkpoint, threads=1))
    assert [check.name for check in checks if check.verdict != "note"] == [
        "metadata",
        "tokenizer",
        "template",
        "stop tokens",
        "sampling",
        "rope",
    ]
    return {check.name: check.words for check in checks if check.verdict == "regressed"}


def export(folder: Path, path: Path, recipe: str = "Q8_0") -> Path:
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, recipe, path, threads=1)
    return path


def edit_json(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def without_newline(data: dict[str, Any]) -> None:
    found = data["chat_template"]
    end = "'<|im_end|>\\n'" if "'<|im_end|>\\n'" in found else "<|im_end|>\n"
    assert end in found
    data["chat_template"] = found.replace(end, end.replace("\\n", "").replace("\n", ""))


FAULTS: dict[str, tuple[str, Edit, dict[str, str]]] = {
    "a newline missing in the template": (
        "tokenizer_config.json",
        without_newline,
        {"template": "of the case: one question"},
    ),
    "a merge lost": (
        "tokenizer.json",
        lambda data: data["model"]["merges"].pop(1),
        {"tokenizer": "the checkpoint's", "metadata": "tokenizer.ggml.merges has"},
    ),
    "another temperature": (
        "generation_config.json",
        lambda data: data.update(temperature=0.7),
        {"sampling": "temperature is 0.7 and 0.6 by the checkpoint"},
    ),
    "another base of rope": (
        "config.json",
        lambda data: data.update(rope_theta=1e4),
        {"rope": "without YaRN turns pair", "metadata": "rope"},
    ),
    "YaRN that is always on": (
        "config.json",
        lambda data: data.update(rope_scaling=YARN),
        {"metadata": "rope.scaling.type is yarn"},
    ),
}
WRONG_END: Edit = lambda data: data.update(eos_token="<|im_start|>")  # noqa: E731
WRONG_ENDS: Edit = lambda data: data.update(eos_token_id=[260, 261])  # noqa: E731


@pytest.mark.parametrize("recipe", ["Q8_0", "Q2_K"])
def test_a_sound_file_is_as_its_checkpoint(tmp_path: Path, recipe: str) -> None:
    """Catches a check that fails what is right, also of few bits."""
    path = export(CHECKPOINT, tmp_path / "nano.gguf", recipe)
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        checks = list(check_parity(path, checkpoint, threads=1))
    assert [check for check in checks if check.verdict != "passed"] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(tmp_path: Path, fault: str) -> None:
    """Catches a check that looks at the file alone, or at the checkpoint alone, or at too much."""
    file, edit, words = FAULTS[fault]
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    wrong = shutil.copytree(source, tmp_path / "wrong")
    edit_json(wrong / file, edit)
    problems = failed(export(wrong, tmp_path / "tiny.gguf"), source)
    assert problems.keys() == words.keys()
    assert all(words[name] in problems[name] for name in words)


def test_all_that_is_wrong_with_nano_qwq_is_named(tmp_path: Path) -> None:
    """Catches a fault that hides another, in a file of a model that can speak."""
    wrong = shutil.copytree(CHECKPOINT, tmp_path / "wrong")
    for file, edit, _ in FAULTS.values():
        edit_json(wrong / file, edit)
    edit_json(wrong / "tokenizer_config.json", WRONG_END)
    problems = failed(export(wrong, tmp_path / "nano.gguf"), CHECKPOINT)
    assert problems.keys() == {
        *("metadata", "tokenizer", "template", "stop tokens", "sampling", "rope")
    }
    assert problems["stop tokens"] == (
        "has [801]: ends at [801], where the checkpoint does not and lacks [802]"
    )


def test_all_that_is_wrong_with_a_gptq_folder_is_named(tmp_path: Path) -> None:
    """Catches faults that are looked for in GGUF files alone."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    folder = write_gptq(tmp_path / "gptq", config=ONE_LAYER)
    assert failed(folder, source) == {}
    for file, edit, _ in FAULTS.values():
        edit_json(folder / file, edit)
    edit_json(folder / "generation_config.json", WRONG_ENDS)
    edit_json(folder / "config.json", lambda data: data.update(max_position_embeddings=40960))
    problems = failed(folder, source)
    assert problems.keys() == {
        *("metadata", "tokenizer", "template", "stop tokens", "sampling", "rope")
    }
    assert "config.json: rope_theta is 10000.0 and 1000000.0" in problems["metadata"]
    assert "is 40960" not in problems["metadata"]
    assert problems["stop tokens"].startswith("has [260, 261]: ends at [260], where")
    assert problems["stop tokens"].endswith("and lacks [259]")


def test_a_missing_end_is_named(tmp_path: Path) -> None:
    """Catches a file that does not say where replies end: not every program knows it otherwise."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    path = export(source, tmp_path / "tiny.gguf")
    data = path.read_bytes()
    assert data.count(b"tokenizer.ggml.eos_token_id") == 1
    path.write_bytes(data.replace(b"ggml.eos_token_id", b"ggml.eot_token_id"))
    assert failed(path, source)["metadata"].startswith("tokenizer.ggml.eos_token_id is missing")
    path.write_bytes(data.replace(b"ggml.eos_token_id", b"ggml.eox_token_id"))
    assert failed(path, source)["stop tokens"] == "has []: lacks [261]"


def test_samplers_in_another_order_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temperature last by the file, which llama.cpp would follow, or by the runtime."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    path = export(source, tmp_path / "tiny.gguf")
    sound = path.read_bytes()
    right = b"penalties;temperature;top_k;top_p;min_p"
    for order, words in (
        (b"penalties;top_k;temperature;top_p;min_p", ""),  # which chooses among the same ids
        (b"penalties;top_k;top_p;min_p;temperature", f"{SEQUENCE} is penalties;top_k"),
        (b"penalties;temperature;top_k;dry;xtc;dry", f"{SEQUENCE} is penalties;temp"),
    ):
        assert sound.count(right) == 1
        path.write_bytes(sound.replace(right, order))
        problem = failed(path, source).get("sampling", "")
        assert problem.startswith(words)
        assert bool(words) == bool(problem)
    path.write_bytes(sound)
    in_order = gguf_engine.make_chain

    def temperature_last(llama: Any, sampling: Sampling, **options: Any) -> Any:
        chain = in_order(llama, sampling, **options)
        n_last = llama.llama_sampler_chain_n(chain) - 1
        draw = llama.llama_sampler_chain_remove(chain, n_last)
        for step in (llama.llama_sampler_chain_remove(chain, 0), draw):
            llama.llama_sampler_chain_add(chain, step)
        return chain

    monkeypatch.setattr(gguf_engine, "make_chain", temperature_last)
    assert "another probability than transformers does" in failed(path, source)["sampling"]


def test_a_runtime_that_reads_positions_otherwise_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YaRN from another length, which the frequencies tell, and none at all, which logits do."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    path = export(source, tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(parity_rope, "longest_yarn", lambda: Yarn(4.0, 40_960))
        for model in (path, source):
            assert failed(model, source)["rope"].startswith("with YaRN turns pair")
    set_rope = TransformersEngine._set_rope
    monkeypatch.setattr(
        TransformersEngine, "_set_rope", lambda engine, _rope: set_rope(engine, None)
    )
    assert "cosine of the changes 0.00" in failed(CHECKPOINT, CHECKPOINT)["rope"]


def of_llama_cpps_converter(case: str, folder: Path, path: Path) -> Path:
    """A file whose keys are all that llama.cpp's converter writes, and no others."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[case]
    ours = export(folder, path.with_suffix(".ours.gguf"))
    header = read_header(ours)
    found = comparable(header.metadata)
    arch = golden["general.architecture"]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in golden.items():
        whole: Any = header.metadata[key]
        if (isinstance(value, str) and "items, SHA-256" in value) or isinstance(value, list):
            assert found[key] == value
            writer.add_array(
                key, [one.item() if isinstance(one, np.generic) else one for one in whole]
            )
        elif key == "general.file_type":
            writer.add_uint32(key, whole)
        elif key != "general.architecture":
            add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32}
            add |= {str: writer.add_string, float: writer.add_float32}
            add[type(value)](key, value)
    for tensor in gguf.GGUFReader(ours).tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_llama_cpps_converter_passes_with_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an alarm for keys that only we write, and for a context length of another day."""
    source = write_case("plain", tmp_path)
    path = of_llama_cpps_converter("plain", source, tmp_path / "theirs.gguf")
    command = ("parity", path, "--source", source)
    assert run(monkeypatch, *command) == 0
    notes = [one for one in capsys.readouterr().out.splitlines() if one.startswith("note")]
    assert [one.split()[2] for one in notes] == [SEQUENCE, "general.sampling.min_p"]
    edit_json(source / "config.json", lambda data: data.update(max_position_embeddings=131072))
    assert run(monkeypatch, *command, "--json") == 0
    checks = json.loads(capsys.readouterr().out)
    words = [one["words"] for one in checks if one["verdict"] == "note"]
    assert "qwen2.context_length is 4096 and 131072 by the checkpoint" in words
    assert {one["verdict"] for one in checks} == {"passed", "note"}

    edit_json(source / "config.json", lambda data: data.update(rope_theta=1e4))
    assert run(monkeypatch, *command, "--json") == 3
    captured = capsys.readouterr()
    wrong = {one["name"] for one in json.loads(captured.out) if one["verdict"] == "regressed"}
    assert wrong == {"metadata", "rope"}
    assert "differs from its checkpoint in metadata, rope; convert" in captured.err


def test_rope_of_qwqs_own_sizes(tmp_path: Path) -> None:
    """Catches a tolerance that 128 columns of a head or a base of a million do not meet."""
    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIG))
    metadata: dict[str, Any] = {
        "qwen2.embedding_length": 5120,
        "qwen2.attention.head_count": 40,
        "qwen2.rope.freq_base": 1e6,
    }
    assert parity_rope.rope_problem(tmp_path, metadata, tmp_path) == ""
    for wrong, words in (
        ({"qwen2.rope.freq_base": 1e6 + 100}, "without YaRN turns pair 63 by"),
        ({"qwen2.rope.dimension_count": 64}, "without YaRN turns 32 pairs and transformers 64"),
        ({"qwen2.rope.scaling.attn_factor": 1.1}, "with YaRN scales attention by 1.2525 and"),
        ({"qwen2.rope.scaling.yarn_beta_slow": 2.0}, "with YaRN turns pair"),
    ):
        assert words in parity_rope.rope_problem(tmp_path, metadata | wrong, tmp_path)


def test_a_number_of_rope_that_is_none_is_an_error() -> None:
    """Catches a hostile file that ends the program with a traceback."""
    sizes = {"qwen2.embedding_length": 64, "qwen2.attention.head_count": 2}
    for base in ("much", 1.0, float("nan"), -1.0):
        with pytest.raises(GgufError, match=r"freq_base: is .*, not a number above 1; make"):
            parity_rope.rope_of_gguf(sizes | {"qwen2.rope.freq_base": base}, None)


def test_a_token_put_before_every_text_is_grave(tmp_path: Path) -> None:
    """Catches a bos that other programs would add by the file's word."""
    source = write_checkpoint(tmp_path / "tiny", config=ONE_LAYER)
    path = export(source, tmp_path / "tiny.gguf")
    data = path.read_bytes()
    key = b"tokenizer.ggml.add_bos_token\x07\x00\x00\x00"
    assert data.count(key + b"\x00") == 1
    path.write_bytes(data.replace(key + b"\x00", key + b"\x01"))
    assert failed(path, source) == {
        "metadata": "tokenizer.ggml.add_bos_token is True and False by the checkpoint"
    }
