"""Faults planted in files of nano-qwq: the gate names each, and is quiet where there is none."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.encode import QuantType, row_nbytes
from convert.gguf_export import export_gguf
from convert.gguf_header import GgufTensor, read_header
from convert.gptq import GptqSettings
from convert.gptq_export import export_gptq
from convert.provenance import TENSOR_SHA256
from quant_eval.baseline import Entry, make_entry
from quant_eval.gate import Check, gate_file
from quant_eval.manifest import Manifest
from quant_eval.measurement import Measured
from quant_eval.nano import CHECKPOINT
from quant_eval.pipeline import Ask, calibration_passages, measure
from quant_eval.results import EvaluationSettings
from quant_eval.suite import EVALUATION_TEXT
from tests.quant_eval.measuring import no_progress

SETTINGS = EvaluationSettings(n_tokens=700, n_problems=0, max_tokens=4)
"""A dozen passages: enough for what is broken, and for what is merely worse the weights tell."""


GPTQ = "gptq-4bit"


@dataclass(frozen=True)
class Bench:
    """nano-qwq with sound files, and where faulty copies go."""

    checkpoint: Checkpoint
    folder: Path

    def sound(self, recipe: str) -> Path:
        path = self.folder / f"nano-{recipe}{'' if recipe == GPTQ else '.gguf'}"
        if not path.exists() and recipe == GPTQ:
            export_gptq(
                self.checkpoint,
                path,
                settings=GptqSettings(bits=4, clip_steps=0),
                calibration=calibration_passages(self.checkpoint),
                n_tokens=600,
            )
        elif not path.exists():
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

    def copy_of_folder(self, edit: Callable[[Path], None]) -> Path:
        path = self.folder / f"faulty-{len(list(self.folder.glob('faulty-*')))}"
        shutil.copytree(self.sound(GPTQ), path)
        edit(path)
        return path

    def entry(self, recipe: str, settings: EvaluationSettings = SETTINGS) -> Entry:
        return make_entry(self.measure(self.sound(recipe), settings), self.checkpoint, threads=1)

    def gate(
        self, path: Path, recipe: str, settings: EvaluationSettings = SETTINGS
    ) -> dict[str, Check]:
        """The checks that did not pass, by name."""
        return self.failed(self.measure(path, settings), self.entry(recipe, settings))

    def failed(self, measured: Measured, entry: Entry) -> dict[str, Check]:
        checks = gate_file(measured, entry, self.checkpoint, threads=1)
        assert {"metadata", "weights"} <= {one.name for one in checks} or checks[-1].name == "file"
        return {check.name: check for check in checks if check.verdict != "passed"}

    def measure(
        self, path: Path, settings: EvaluationSettings = SETTINGS, threads: int = 1
    ) -> Measured:
        found, failures = measure(
            self.checkpoint,
            [path],
            Manifest(self.folder / "measured"),
            Ask(settings, EVALUATION_TEXT),
            threads=threads,
            on_progress=no_progress,
        )
        assert failures == []
        return found[0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Checkpoint.open(CHECKPOINT) as checkpoint:
        yield Bench(checkpoint, tmp_path_factory.mktemp("bench"))


def tensor_of(path: Path, name: str) -> GgufTensor:
    return read_header(path).tensors[name]


def make_otherwise(data: bytearray, name: str, path: Path) -> None:
    """The same model in other bytes: its name, and the order of its tensors.

    path: of a Q8_0 or Q6_K file, in which both are of one type.
    """
    at = data.index(b"general.name") + len(b"general.name") + 4
    n = int.from_bytes(data[at : at + 8], "little")
    data[at + 8 : at + 8 + n] = name[-n:].rjust(n, "_").encode()
    names = ("blk.0.ffn_up.weight", "blk.3.ffn_up.weight")
    labels = [data.index(one.encode()) for one in names]
    swap(data, *places_of(path, *names))
    swap(data, *(slice(at, at + len(names[0])) for at in labels))


def swap(data: bytearray, a: slice, b: slice) -> None:
    data[a], data[b] = data[b], data[a]


def places_of(path: Path, *names: str) -> Iterator[slice]:
    for tensor in (tensor_of(path, name) for name in names):
        yield slice(tensor.offset, tensor.offset + tensor.nbytes)


def test_the_same_model_made_again_is_quiet(bench: Bench) -> None:
    """Catches a gate that fails what is as it was, also in other bytes and with more threads."""
    assert bench.gate(bench.sound("Q8_0"), "Q8_0") == {}
    again = bench.copy("Q8_0", partial(make_otherwise, name="again", path=bench.sound("Q8_0")))
    assert bench.failed(bench.measure(again, threads=2), bench.entry("Q8_0")) == {}


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
    names = ("blk.0.ffn_up.weight", "blk.3.ffn_up.weight")

    def edit(data: bytearray) -> None:
        swap(data, *places_of(bench.sound("Q8_0"), *names))

    failed = bench.gate(bench.copy("Q8_0", edit), "Q8_0")
    assert failed["mean KL, nats"].verdict == "regressed"
    assert "blk.0.ffn_up.weight" in failed["weights"].words


def test_fewer_bits_are_noticed(bench: Bench) -> None:
    """Q4_K where the baseline has Q6_K: by the weights, and by what the model says."""
    failed = bench.gate(bench.sound("Q4_K_M"), "Q6_K", replace(SETTINGS, n_tokens=3500))
    assert failed["weights"].verdict == "regressed"
    assert failed["tokens above the first's median KL"].verdict == "regressed"


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
    """Of a checkpoint that has YaRN: the right length passes, another one does not."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "nano")
    set_keys(folder / "config.json", rope_scaling=YARN)
    key = b"qwen2.rope.scaling.original_context_length\x04\x00\x00\x00"

    def edit(data: bytearray) -> None:
        right, wrong = (key + n.to_bytes(4, "little") for n in (32768, 40960))
        assert data.count(right) == 1
        data[:] = data.replace(right, wrong)

    with Checkpoint.open(folder) as checkpoint:
        scaled = Bench(checkpoint, tmp_path)
        same = scaled.copy("Q8_0", partial(make_otherwise, name="b", path=scaled.sound("Q8_0")))
        assert scaled.gate(same, "Q8_0") == {}
        failed = scaled.gate(scaled.copy("Q8_0", edit), "Q8_0")
    assert failed["metadata"].words == (
        "qwen2.rope.scaling.original_context_length is 40960 and 32768 by the checkpoint"
    )
    assert "qwen2.rope.scaling" in bench.gate(same, "Q8_0")["metadata"].words  # where none was


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def set_keys(path: Path, **values: object) -> None:
    """In a JSON file; None removes the key."""
    table = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def without_a_newline(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    template = json.loads(path.read_text())["chat_template"]
    set_keys(path, chat_template=template.replace("'<|im_end|>\\n'", "'<|im_end|>'", 1))


def with_other_digits(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("\\\\p{N}|", "\\\\p{N}{1,3}|"))


def without_an_end(folder: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        set_keys(folder / name, eos_token_id=None)


def with_keys(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: set_keys(folder / name, **values)


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "template": (without_a_newline, "tokenizer.chat_template differs from the checkpoint's"),
    "digits": (with_other_digits, "tokenizer"),
    "other end": (
        with_keys("generation_config.json", eos_token_id=3),
        "stop ids is [3] and [800, 802]",
    ),
    "no end": (without_an_end, "stop ids is [] and [800, 802]"),
    "temperature": (with_keys("generation_config.json", temperature=1.0), "temperature is 1.0"),
    "greedy": (with_keys("generation_config.json", do_sample=False), "do_sample is False and True"),
    "rope": (with_keys("config.json", rope_theta=1e4), "rope_theta is 10000.0 and 1000000.0"),
    "rope, new spelling": (
        with_keys("config.json", rope_parameters={"rope_theta": 1e4}),
        "rope_theta is 10000.0 and 1000000.0",
    ),
    "yarn": (with_keys("config.json", rope_scaling=YARN), "rope_scaling is RopeScaling"),
    "yarn, new spelling": (
        with_keys("config.json", rope_parameters=YARN | {"rope_type": "yarn", "rope_theta": 1e6}),
        "rope_scaling is RopeScaling",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_wrong_words_of_a_folder_are_noticed(bench: Bench, fault: str) -> None:
    """Catches a GPTQ folder whose weights are sound and whose files mislead every reader.

    The numbers are the sound folder's, so that the files alone tell.
    """
    edit, words = FOLDER_FAULTS[fault]
    folder = bench.copy_of_folder(edit)
    measured = replace(bench.measure(bench.sound(GPTQ)), path=folder, sha256="another")
    failed = bench.failed(measured, bench.entry(GPTQ))
    assert set(failed) == {"metadata"}
    assert words in failed["metadata"].words


def with_linear(folder: Path, part: str, factor: float) -> None:
    """One linear's codes or scales times a number, in whichever shard they are."""
    from safetensors.torch import load_file, save_file

    name = f"model.layers.0.mlp.down_proj.{part}"
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = (tensors[name] * factor).to(tensors[name].dtype)
            save_file(tensors, shard, {"format": "pt"})
            return
    raise AssertionError(name)


def test_damaged_linears_of_a_folder_are_noticed(bench: Bench) -> None:
    """Scales off by 2 %, and a linear of zeros; the sound folder in other bytes is quiet."""
    failed = bench.gate(bench.copy_of_folder(lambda at: with_linear(at, "scales", 1.02)), GPTQ)
    assert failed["weights"].words.startswith("model.layers.0.mlp.down_proj.weight differs")
    # and 2 % less, which brings so coarse a tensor nearer to its source
    failed = bench.gate(bench.copy_of_folder(lambda at: with_linear(at, "scales", 0.98)), GPTQ)
    assert failed["weights"].words.startswith("model.layers.0.mlp.down_proj.weight is 0.9")
    failed = bench.gate(bench.copy_of_folder(lambda at: with_linear(at, "scales", 0.0)), GPTQ)
    assert failed["mean KL, nats"].verdict == "regressed"
    assert "down_proj.weight differs from the checkpoint by 100" in failed["weights"].words
    other = bench.copy_of_folder(lambda at: set_keys(at / "config.json", note="made again"))
    assert bench.gate(other, GPTQ) == {}


def test_a_missing_or_broken_tensor_of_a_folder_is_noticed(bench: Bench) -> None:
    """Catches a folder that is passed for what is left of it; and a GGUF file against a folder."""
    measured = bench.measure(bench.sound(GPTQ))
    entry = bench.entry(GPTQ)
    broken = bench.copy_of_folder(lambda at: with_linear(at, "scales", float("nan")))
    failed = bench.failed(replace(measured, path=broken, sha256="another"), entry)
    assert "a scale is NaN" in failed["weights"].words
    failed = bench.failed(replace(measured, path=bench.sound("Q8_0"), sha256="another"), entry)
    assert failed["weights"].verdict == "unmeasured"


@pytest.mark.slow
def test_twenty_of_twenty_other_seeds_are_quiet(bench: Bench) -> None:
    """Catches a gate that cries wolf: the same model in other bytes, asked with other seeds.

    Nothing is known of a file from one before, so KL, weights and metadata are judged each time. A
    rate of ALARM_RATE would give an alarm in 20 gates at most one time in five.
    """
    asked = replace(SETTINGS, n_problems=2, max_tokens=96, task_seconds=math.inf)
    entry = bench.entry("Q6_K", asked)
    assert {"solved", "kl"} <= entry.samples.keys()
    sound = bench.sound("Q6_K")
    for seed in range(1000, 21_000, 1000):
        again = bench.copy("Q6_K", partial(make_otherwise, name=str(seed), path=sound))
        other = bench.measure(
            again, replace(asked, reply_seed=seed), threads=2 if seed % 5000 == 0 else 1
        )
        assert other.sha256 != entry.sha256
        assert bench.failed(other, entry) == {}, f"seed {seed}"
