"""Damaged models: refused in words or loaded, and no process dies of one."""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.errors import CheckpointError, EngineError, GgufError, QwqError
from convert.gguf_export import export_gguf
from convert.gguf_header import read_header
from qwq_local import QwQ, Sampling
from qwq_local.description import describe_folder, describe_gguf
from qwq_local.engine import EngineSettings
from qwq_local.engines.folder import read_folder
from qwq_local.engines.gguf import plan_gguf
from qwq_local.engines.isolated import IsolatedEngine
from qwq_local.engines.transformers import TransformersEngine
from tests.hostile_folders import damaged_folders
from tests.hostile_gguf import Parts, damaged, put_together, take_apart
from tests.native_loads import load_each
from tests.synthetic import write_checkpoint, write_gptq

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS = EngineSettings(64, 1, speculation="off")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "tiny.gguf"
    with Checkpoint.open(write_checkpoint(folder / "checkpoint", config=TINY)) as checkpoint:
        export_gguf(checkpoint, "BF16", path, threads=1)
    return path.read_bytes()


def check(path: Path) -> None:
    """All that happens to a file before llama.cpp sees it."""
    header = read_header(path)
    describe_gguf(path, header)
    plan_gguf(path, header, SETTINGS)


def refusal(check: Callable[[Path], object], path: Path) -> str | None:
    """What a check says against a file or folder, if anything."""
    try:
        check(path)
    except QwqError as error:
        return str(error)
    return None


def passing(path: Path, whole: bytes, n: int, seed: int) -> Iterator[str]:
    """What was done to each of n files that passes the checks; the file lies at the path then."""
    for what, data in damaged(whole, n, seed=seed):
        path.write_bytes(data)
        said = refusal(check, path)
        if said is None:
            yield what
        else:
            assert len(said) < 1000, what
            assert re.search(r"^(/.*odd\.gguf|context): .*; ", said, re.DOTALL), said


def test_parts_are_put_together_as_they_were(tiny_gguf: bytes) -> None:
    assert put_together(take_apart(tiny_gguf)) == tiny_gguf


def test_the_checks_take_any_damage(tmp_path: Path, tiny_gguf: bytes) -> None:
    """Would catch another error than QwqError, and checks that refuse everything."""
    n_passed = len(list(passing(tmp_path / "odd.gguf", tiny_gguf, 1200, seed=11)))
    assert 300 < n_passed < 900


def test_what_passes_the_checks_kills_no_process(tmp_path: Path, tiny_gguf: bytes) -> None:
    """Would catch an abort in native code, a hang, memory without bounds: a child loads each."""
    path = tmp_path / "odd.gguf"
    done: list[str] = []

    def paths() -> Iterator[Path]:
        for what in passing(path, tiny_gguf, 500, seed=12):
            done.append(what)
            yield path

    outcomes = list(load_each(paths()))
    assert outcomes.count("loaded") > 100
    for what, outcome in zip(done, outcomes, strict=True):
        assert outcome == "loaded" or outcome.startswith(("GgufError: ", "QwqError: ")), (
            what,
            outcome,
        )


def with_value(key: bytes, value: bytes) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        pairs = tuple(replace(p, value=value) if p.key == key else p for p in parts.pairs)
        return replace(parts, pairs=pairs)

    return change


def with_tokens(*tokens: bytes) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        pairs = tuple(
            replace(p, items=(*tokens, *p.items[len(tokens) :]))
            if p.key == b"tokenizer.ggml.tokens"
            else p
            for p in parts.pairs
        )
        return replace(parts, pairs=pairs)

    return change


def with_type(kind: int) -> Callable[[Parts], Parts]:
    def change(parts: Parts) -> Parts:
        entries = tuple(
            replace(e, kind=kind) if e.name == b"blk.0.attn_k.weight" else e for e in parts.entries
        )
        return replace(parts, entries=entries)

    return change


EPSILON = b"qwen2.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (with_tokens(b"same", b"same"), "has 320 tokens, 319 different ones"),
        (with_tokens(b"a\0b", b"a\0c"), "or a zero byte in one; make"),
        (with_type(25), r"attn_k\.weight is stored as I16, which is no type of weights"),
        (with_value(b"tokenizer.ggml.model", b"llama"), "model is 'llama' and QwQ's is 'gpt2'"),
        (with_value(EPSILON, struct.pack("<f", float("nan"))), "rms_epsilon is nan and must be"),
        (with_value(b"qwen2.rope.freq_base", struct.pack("<f", 0.0)), "freq_base is 0.0 and must"),
    ],
    ids=["token twice", "zero byte", "integers", "tokenizer", "epsilon", "rope"],
)
def test_what_llama_would_die_of_is_refused(
    tmp_path: Path, tiny_gguf: bytes, change: Callable[[Parts], Parts], error: str
) -> None:
    """Each of these ended the process: an assertion, an exception, an address."""
    path = tmp_path / "odd.gguf"
    path.write_bytes(put_together(change(take_apart(tiny_gguf))))
    with pytest.raises(GgufError, match=error):
        check(path)


def test_a_process_that_dies_while_it_loads_names_the_file(
    bf16_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IsolatedEngine, "entry", "tests.native_loads:die")
    expected = r"nano-qwq-BF16\.gguf: loading it ended the process that did .*SIGABRT.*; fetch"
    with pytest.raises(EngineError, match=expected):
        QwQ.open(bf16_gguf)


@pytest.fixture(scope="module", params=["unquantized", "GPTQ"])
def tiny_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = write_gptq if request.param == "GPTQ" else write_checkpoint
    return write(tmp_path_factory.mktemp("tiny") / "folder", config=TINY)


def check_folder(path: Path) -> None:
    describe_folder(path)
    read_folder(path)


def passing_folders(whole: Path, work: Path, n: int, seed: int) -> Iterator[str]:
    for what, folder in damaged_folders(whole, work, n, seed=seed):
        said = refusal(check_folder, folder)
        if said is None:
            yield what
        else:
            assert "; " in said, what


def test_the_checks_take_any_damaged_folder(tmp_path: Path, tiny_folder: Path) -> None:
    n_passed = len(list(passing_folders(tiny_folder, tmp_path / "odd", 250, seed=21)))
    assert 50 < n_passed < 200


def test_torch_takes_what_passes_the_checks(tmp_path: Path, tiny_folder: Path) -> None:
    """Would catch what comes out of transformers, tokenizers or a kernel as something else."""
    folder = tmp_path / "odd"
    n_run = 0
    for _ in passing_folders(tiny_folder, folder, 24, seed=22):
        sampling: Sampling = describe_folder(folder).sampling
        try:
            engine = TransformersEngine(folder, SETTINGS)
        except QwqError:
            continue
        ids = engine.tokenize("The <think> ☃", parse_special=False)
        made = engine.generate(ids, sampling=sampling, seed=1, max_tokens=2, stop_ids=())
        n_run += len(list(made)) == 2
        engine.close()
    assert n_run > 1


def _set(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def _wrong_groups(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    n_header = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_header])
    start = 8 + n_header + header["model.layers.0.mlp.up_proj.g_idx"]["data_offsets"][0]
    data[start : start + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (_set(bits=5), r"bits is 5 and must be one of \(2, 3, 4, 8\)"),
        (_set(bits=8), r"qweight has shape \[8, 64\] and config.json asks for \[16, 64\]"),
        (_set(bits=1 << 40), "bits is 1099511627776 and must be"),
        (_set(group_size=0), "group_size is 0 and must be -1 or 1 to"),
        (_set(group_size=64), r"qzeros has shape \[2, 8\] and config.json asks for \[1, 8\]"),
        (_set(checkpoint_format="awq"), "its format is 'awq' in 'int32' and must be one of"),
        (_set(desc_act="yes"), "desc_act is 'yes', neither true nor false"),
        (_wrong_groups, r"up_proj\.g_idx names groups 0 to 99 of 2; make"),
    ],
    ids=["5 bits", "8 bits", "bits", "no group", "groups", "format", "order", "indices"],
)
def test_a_gptq_folder_that_contradicts_itself_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], error: str
) -> None:
    """Kernels believe these numbers; on a GPU a wrong index ends the process."""
    whole = write_gptq(tmp_path / "whole", config=TINY)
    folder = tmp_path / "odd"
    shutil.copytree(whole, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=error):
        QwQ.open(folder, isolated=False)


def test_a_tokenizer_of_more_ids_than_rows_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "few", config=TINY | {"vocab_size": 264})
    with pytest.raises(CheckpointError, match="it has the id 265 and the model 264 rows; fetch"):
        QwQ.open(folder, isolated=False)
