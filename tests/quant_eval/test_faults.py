"""Faults planted in files of nano-qwq: the gate names each, and is quiet where there is none."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.encode import QuantType, row_nbytes
from convert.gguf_export import export_gguf
from convert.gguf_header import GgufTensor, read_header
from convert.provenance import TENSOR_SHA256
from quant_eval.baseline import Entry, differences_of, make_entry
from quant_eval.gate import Check, gate_file
from quant_eval.manifest import Manifest
from quant_eval.measurement import Measured
from quant_eval.nano import CHECKPOINT
from quant_eval.pipeline import Ask, measure
from quant_eval.results import EvaluationSettings
from tests.quant_eval.measuring import no_progress

SETTINGS = EvaluationSettings(n_tokens=700, n_problems=0, max_tokens=4)
"""A dozen passages: enough for what is broken, and for what is merely worse the weights tell."""


@dataclass(frozen=True)
class Bench:
    """nano-qwq with sound files, and where faulty copies go."""

    checkpoint: Checkpoint
    folder: Path

    def sound(self, recipe: str) -> Path:
        path = self.folder / f"nano-{recipe}.gguf"
        if not path.exists():
            export_gguf(self.checkpoint, recipe, path, threads=1)
        return path

    def copy(self, recipe: str, edit: Callable[[bytearray], None]) -> Path:
        path = self.folder / "faulty" / f"{len(list(self.folder.rglob('*.gguf')))}.gguf"
        path.parent.mkdir(exist_ok=True)
        data = bytearray(self.sound(recipe).read_bytes())
        edit(data)
        # without the hashes that the file lists of itself: a fault of the encoder would be in them
        data[:] = data.replace(TENSOR_SHA256.encode(), b"qwq.tensor_sha---")
        path.write_bytes(data)
        return path

    def entry(self, recipe: str, settings: EvaluationSettings = SETTINGS) -> Entry:
        return make_entry(self.measure(self.sound(recipe), settings), self.checkpoint, threads=1)

    def gate(
        self, path: Path, recipe: str, settings: EvaluationSettings = SETTINGS
    ) -> dict[str, Check]:
        """The checks that did not pass, by name."""
        entry = self.entry(recipe, settings)
        checks = gate_file(self.measure(path, settings), entry, self.checkpoint, threads=1)
        return {check.name: check for check in checks if check.verdict != "passed"}

    def measure(self, path: Path, settings: EvaluationSettings = SETTINGS) -> Measured:
        manifest = Manifest(self.folder / "measured")
        (measured,), failures = measure(
            self.checkpoint, [path], manifest, Ask(settings), threads=1, on_progress=no_progress
        )
        assert failures == []
        return measured


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        yield Bench(checkpoint, tmp_path_factory.mktemp("bench"))


def tensor_of(path: Path, name: str) -> GgufTensor:
    return read_header(path).tensors[name]


def test_the_same_model_made_again_is_quiet(bench: Bench) -> None:
    """Catches a gate that fails what is as it was, also where the bytes are others."""
    path = bench.sound("Q8_0")
    assert bench.gate(path, "Q8_0") == {}

    def change_name(data: bytearray) -> None:
        at = data.index(b"qwq.recipe") - 8
        data[at + 8 : at + 18] = b"qwq.recipX"

    assert bench.gate(bench.copy("Q8_0", change_name), "Q8_0") == {}


def test_a_tensor_of_zeros_is_noticed(bench: Bench) -> None:
    """By what the model says, and by the tensor's name.

    In the first layer: after it a small model may hardly need the one or other tensor.
    """
    tensor = tensor_of(bench.sound("Q8_0"), "blk.0.ffn_down.weight")

    def edit(data: bytearray) -> None:
        data[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)

    failed = bench.gate(bench.copy("Q8_0", edit), "Q8_0")
    assert failed["mean KL, nats"].verdict == "regressed"
    assert "blk.0.ffn_down.weight differs from the source by 100" in failed["weights"].words


def test_scales_off_by_two_percent_are_noticed(bench: Bench) -> None:
    """In one tensor of one layer: the weights tell, though the KL of a few passages may not."""
    tensor = tensor_of(bench.sound("Q8_0"), "blk.5.attn_v.weight")
    assert row_nbytes(QuantType.Q8_0, 32) == 34

    def edit(data: bytearray) -> None:
        blocks = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset).reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16)
        blocks[:, :2] = (scales * np.float16(1.02)).view(np.uint8)

    failed = bench.gate(bench.copy("Q8_0", edit), "Q8_0")
    assert "blk.5.attn_v.weight differs from the source by 2.0" in failed["weights"].words


def test_swapped_tensors_are_noticed(bench: Bench) -> None:
    """Of the same shape in two layers: by what the model says, and by name."""
    first, second = (
        tensor_of(bench.sound("Q8_0"), f"blk.{layer}.ffn_up.weight") for layer in (0, 3)
    )

    def edit(data: bytearray) -> None:
        a, b = (slice(one.offset, one.offset + one.nbytes) for one in (first, second))
        data[a], data[b] = data[b], data[a]

    failed = bench.gate(bench.copy("Q8_0", edit), "Q8_0")
    assert failed["mean KL, nats"].verdict == "regressed"
    assert "blk.0.ffn_up.weight" in failed["weights"].words


def test_fewer_bits_are_noticed(bench: Bench) -> None:
    """Q4_K where the baseline has Q6_K, by the weights; Q2_K by what the model says too."""
    failed = bench.gate(bench.sound("Q4_K_M"), "Q6_K")
    assert failed["weights"].verdict == "regressed"
    failed = bench.gate(bench.sound("Q2_K"), "Q6_K", replace(SETTINGS, n_tokens=3500))
    assert failed["mean KL, nats"].verdict == "regressed"


def test_a_newline_missing_in_the_template_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """Which no divergence shows, since it is measured on the right prompts."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "nano")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "'<|im_end|>\\n'" in config["chat_template"]
    config["chat_template"] = config["chat_template"].replace("'<|im_end|>\\n'", "'<|im_end|>'", 1)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "faulty.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
    failed = bench.gate(path, "Q8_0")
    assert set(failed) == {"metadata"}
    assert failed["metadata"].words.startswith("tokenizer.chat_template differs")


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        (
            b"penalties;temperature;top_k;top_p;min_p",
            b"penalties;top_k;top_p;min_p;temperature",
            "general.sampling.sequence",
        ),
        (
            b"tokenizer.ggml.eos_token_id",
            b"tokenizer.ggml.eox_token_id",
            "tokenizer.ggml.eos_token_id is missing",
        ),
    ],
)
def test_wrong_words_in_the_header_are_noticed(
    bench: Bench, right: bytes, wrong: bytes, words: str
) -> None:
    """Temperature applied last, and an end-of-sequence token that is missing."""

    def edit(data: bytearray) -> None:
        assert data.count(right) == 1
        at = data.index(right)
        data[at : at + len(right)] = wrong

    failed = bench.gate(bench.copy("Q8_0", edit), "Q8_0")
    assert set(failed) == {"metadata"}
    assert words in failed["metadata"].words


def test_another_length_of_yarn_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """Wrong by the checkpoint's own number, and YaRN where the checkpoint has none."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "nano")
    config = json.loads((folder / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    path = tmp_path / "yarn.gguf"
    with Checkpoint.open(folder) as checkpoint:
        export_gguf(checkpoint, "Q8_0", path, threads=1)
        assert differences_of(path, checkpoint) == ()
        data = path.read_bytes()
        key = b"qwen2.rope.scaling.original_context_length\x04\x00\x00\x00"
        assert data.count(key) == 1
        right, wrong = (key + n.to_bytes(4, "little") for n in (32768, 40960))
        path.write_bytes(data.replace(right, wrong))
        (words,) = differences_of(path, checkpoint)
    assert words == (
        "qwen2.rope.scaling.original_context_length is 40960 and 32768 by the checkpoint"
    )
    assert "qwen2.rope.scaling" in bench.gate(path, "Q8_0")["metadata"].words


@pytest.mark.slow
def test_twenty_of_twenty_other_seeds_are_quiet(bench: Bench) -> None:
    """Catches a gate that cries wolf: the same model, made again, asked with other seeds.

    A rate of ALARM_RATE would give an alarm in 20 gates at most one time in five.
    """
    asked = replace(SETTINGS, n_problems=2, max_tokens=96)
    entry = make_entry(bench.measure(bench.sound("Q6_K"), asked), bench.checkpoint, threads=1)
    assert "solved" in entry.samples
    again = bench.folder / "again.gguf"
    export_gguf(bench.checkpoint, "Q6_K", again, threads=1)
    for seed in range(1000, 21_000, 1000):
        other = bench.measure(again, replace(asked, reply_seed=seed))
        checks = gate_file(other, entry, bench.checkpoint, threads=1)
        failed = [check for check in checks if check.verdict != "passed"]
        assert failed == [], f"seed {seed}"
