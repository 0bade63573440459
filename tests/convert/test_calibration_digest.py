"""The calibration set's digest is in every file that was made with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors import safe_open
from typer.testing import CliRunner

from convert.calibrate_cli import app as calibrate_app
from convert.calibration import set_digest
from convert.cli import app
from convert.gguf_header import read_header
from convert.passages import load_passages
from tests.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a text, a calibration on it, and an evaluation text that rode along."""
    folder = tmp_path_factory.mktemp("digest")
    config: dict[str, object] = {"num_hidden_layers": 1}
    write_checkpoint(folder / "model", config=config)
    lines = (json.dumps({"text": f"{i} times {i} is {i * i}. "}) for i in range(11, 43))
    (folder / "text.jsonl").write_text("\n".join(lines))
    evaluated = {"messages": [{"role": "user", "content": "2+2?"}], "reasoning": "", "answer": "4"}
    (folder / "evaluation.jsonl").write_text(json.dumps(evaluated))
    paths = ("-o", "made", "--text", "text.jsonl", "--evaluation", "evaluation.jsonl")
    CliRunner().invoke(
        calibrate_app,
        [
            str(folder / "model"),
            *(one if one.startswith("-") else str(folder / one) for one in paths),
            *("--hessians", "--sensitivities", "--sensitivity-tokens", "200"),
            *("--device", "cpu", "-q"),
        ],
        catch_exceptions=False,
    )
    return folder


def convert(folder: Path, kind: str, *options: str | Path) -> Path:
    """A new output in the folder."""
    out = folder / f"out-{len(list(folder.iterdir()))}{'.gguf' if kind == 'gguf' else ''}"
    arguments = (kind, folder / "model", "-o", out, *options, "-q")
    CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    return out


def in_gguf(*options: str) -> Callable[[Path], object]:
    def found(folder: Path) -> object:
        given = (folder / one if one.startswith("made") else one for one in options)
        return read_header(convert(folder, "gguf", *given)).metadata["quantize.imatrix.dataset"]

    return found


def in_rounding(folder: Path) -> object:
    options = ("--type", "Q4_0", "--calibration", folder / "made", "--rounding", "gptq")
    return read_header(convert(folder, "gguf", *options)).metadata["qwq.rounding"]


def in_gptq(folder: Path) -> object:
    out = convert(folder, "gptq", "--text", folder / "text.jsonl")
    return json.loads((out / "config.json").read_text())["quantization_config"]


def in_imatrix(folder: Path) -> object:
    field = GGUFReader(folder / "made/imatrix.gguf").get_field("imatrix.datasets")
    assert field is not None
    return field.contents()


def in_metadata(name: str) -> Callable[[Path], object]:
    def found(folder: Path) -> object:
        with safe_open(folder / "made" / name, "np") as tensors:
            return tensors.metadata()

    return found


def in_evaluation(folder: Path) -> object:
    with np.load(folder / "made/evaluation.npz") as arrays:
        return arrays["calibration_sha256"]


FIT = ("--fit", "9MB", "--context", "64", "--margin", "1KB", "--calibration", "made")
PLACES: dict[str, Callable[[Path], object]] = {
    "calibration.json": lambda folder: (folder / "made/calibration.json").read_text(),
    "imatrix.gguf": in_imatrix,
    "imatrix.dat": lambda folder: (folder / "made/imatrix.dat").read_bytes(),
    "layer": in_metadata("layer-000.safetensors"),
    "sensitivities": in_metadata("sensitivities.safetensors"),
    "evaluation": in_evaluation,
    "--imatrix gguf": in_gguf("--type", "Q4_0", "--imatrix", "made/imatrix.gguf"),
    "--imatrix dat": in_gguf("--type", "Q4_0", "--imatrix", "made/imatrix.dat"),
    "--calibration": in_gguf("--type", "Q4_0", "--calibration", "made"),
    "--fit": in_gguf(*FIT),
    "--rounding gptq": in_rounding,
    "gptq": in_gptq,
}


@pytest.mark.parametrize("place", PLACES)
def test_the_sets_digest_is_there(folder: Path, place: str) -> None:
    """Catches a file of which nobody can tell what it was calibrated on."""
    assert set_digest(load_passages(folder / "text.jsonl")) in str(PLACES[place](folder))
