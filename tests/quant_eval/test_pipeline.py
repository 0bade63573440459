"""From a checkpoint to measured files: what is made, kept, refused; and the program's errors."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.errors import DiskFullError, OutputExistsError, UsageError
from convert.files import partial_path
from quant_eval import pipeline
from quant_eval.manifest import Manifest
from quant_eval.pipeline import NANO_CHECKPOINT, NANO_TYPES, model_name, parse_types
from qwq_local.cli import main
from tests.synthetic import Array, write_checkpoint


def no_progress(_stage: str, _done: int, _total: int) -> None:
    pass


def quantize(checkpoint: Path, out: Path, *types: str, force: bool = False) -> dict[str, bool]:
    """Make the types; returns for each whether it was kept."""
    manifest = Manifest(out)
    with Checkpoint.open(checkpoint) as opened:
        plan = pipeline.make_plan(opened, types, manifest, force=force)
        pipeline.write(plan, manifest, threads=1, force=force, on_progress=no_progress)
        pipeline.check(plan.outputs, manifest, threads=1, on_progress=no_progress)
    return {output.type_name: output.kept for output in plan.outputs}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the program in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["qwq", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_types_are_known_or_listed() -> None:
    """Catches a type that is guessed, made twice, or refused for its case."""
    assert parse_types(["q4_k_m", "GPTQ-4BIT", "Q4_K_M"]) == ("Q4_K_M", "gptq-4bit")
    assert parse_types(NANO_TYPES) == NANO_TYPES
    with pytest.raises(UsageError, match=r"type Q4KM: is unknown; choose from .*Q4_K_M.*gptq-4bit"):
        parse_types(["Q4KM"])


def test_files_are_named_after_the_model(tmp_path: Path) -> None:
    """Catches files named after a folder that says nothing."""
    with Checkpoint.open(NANO_CHECKPOINT) as nano:
        assert model_name(nano) == "nano-qwq"
    with Checkpoint.open(write_checkpoint(tmp_path / "QwQ-32B")) as other:
        assert model_name(other) == "QwQ-32B"


def test_a_second_run_keeps_what_is_there(tmp_path: Path) -> None:
    """Catches work done twice, and a type that is left out because another is there."""
    checkpoint, out = write_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    assert quantize(checkpoint, out, "Q8_0") == {"Q8_0": False}
    made = (out / "tiny-Q8_0.gguf").stat()
    assert quantize(checkpoint, out, "Q8_0", "Q4_K_M") == {"Q8_0": True, "Q4_K_M": False}
    kept = (out / "tiny-Q8_0.gguf").stat()
    assert (kept.st_mtime_ns, kept.st_ino) == (made.st_mtime_ns, made.st_ino)


def test_what_was_made_of_something_else_is_refused(tmp_path: Path) -> None:
    """Catches an old file that passes as made of new weights, and one overwritten unasked."""
    checkpoint, out = write_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    quantize(checkpoint, out, "Q8_0")
    before = (out / "tiny-Q8_0.gguf").read_bytes()

    def change(tensors: dict[str, Array]) -> None:
        tensors["model.norm.weight"] *= np.float32(1.5)

    write_checkpoint(checkpoint, edit=change)
    with pytest.raises(OutputExistsError, match="--force"):
        quantize(checkpoint, out, "Q8_0")
    assert (out / "tiny-Q8_0.gguf").read_bytes() == before
    assert quantize(checkpoint, out, "Q8_0", force=True) == {"Q8_0": False}
    assert (out / "tiny-Q8_0.gguf").read_bytes() != before


def test_a_file_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    """Catches a user's own file replaced because its name fits."""
    checkpoint, out = write_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    out.mkdir()
    (out / "tiny-Q8_0.gguf").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="of another checkpoint or otherwise"):
        quantize(checkpoint, out, "Q8_0")
    assert (out / "tiny-Q8_0.gguf").read_bytes() == b"mine"


def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a plan that leaves traces, or whose sizes are not those of the files."""
    checkpoint, out = write_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    options = ("--type", "Q4_K_M", "--type", "gptq-4bit", "-o", out)
    assert run(monkeypatch, "quantize", checkpoint, *options, "--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    plan = document["outputs"]
    assert document["disk_needed_nbytes"] == sum(row["nbytes"] for row in plan)
    assert not out.exists()
    assert [row["type"] for row in plan] == ["Q4_K_M", "gptq-4bit"]
    assert run(monkeypatch, "quantize", checkpoint, *options[:2], "-o", out, "--no-eval", "-q") == 0
    assert capsys.readouterr().out.split() == [plan[0]["path"]]
    assert Path(plan[0]["path"]).stat().st_size == plan[0]["nbytes"]
    assert not (out / "report.json").exists()


def test_what_is_written_already_takes_no_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an interrupted run refused on the disk that its first part has almost filled."""
    with Checkpoint.open(write_checkpoint(tmp_path / "tiny")) as checkpoint:
        plan = partial(
            pipeline.make_plan, checkpoint, ["Q8_0"], Manifest(tmp_path / "out"), force=False
        )
        (output,) = plan().outputs
        begun = partial_path(output.path)
        begun.parent.mkdir()
        begun.write_bytes(bytes(output.nbytes // 2))
        monkeypatch.setattr("convert.files.free_space", lambda _: output.nbytes * 2 // 3)
        plan()
        begun.unlink()
        with pytest.raises(DiskFullError):
            plan()


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a stack trace, a wrong exit code, and an error without its remedy."""
    checkpoint = write_checkpoint(tmp_path / "tiny")
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.jsonl"
    text.write_text("")
    out = ("-o", tmp_path / "out")
    gguf = tmp_path / "is.gguf"
    gguf.write_bytes(b"")
    cases: list[tuple[int, str, tuple[str | Path, ...]]] = [
        (2, "is unknown; choose from", ("quantize", checkpoint, "--type", "Q9", *out)),
        (1, "holds no config.json", ("quantize", empty, *out)),
        (1, "no such file or folder", ("quantize", tmp_path / "none", *out)),
        (
            1,
            "no such file or folder",
            ("eval", "run", "none.gguf", "--reference", checkpoint, *out),
        ),
        (
            1,
            "holds no text",
            ("eval", "run", gguf, "--reference", checkpoint, "--text", text, *out),
        ),
        (1, "holds no text", ("quantize", checkpoint, "--text", text, *out)),
        (2, "--tokens", ("quantize", checkpoint, "--tokens", "0", *out)),
    ]
    for code, reason, arguments in cases:
        assert run(monkeypatch, *arguments) == code, reason
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, captured.err
        assert reason in errors[0]
        assert "Traceback" not in captured.err
        assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_nano_from_checkpoint_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches any step of `make quantize` that does not fit the next, GPTQ's included."""
    small = ("--tokens", "200", "--problems", "1", "--max-tokens", "24", "--task-seconds", "20")
    types = ("--type", "BF16", "--type", "Q2_K", "--type", "gptq-4bit")
    command = ("quantize", NANO_CHECKPOINT, *types, "-o", tmp_path, *small)
    assert run(monkeypatch, *command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["files"]}
    assert list(rows) == ["nano-qwq-BF16.gguf", "nano-qwq-Q2_K.gguf", "nano-qwq-gptq-4bit"]
    kl = [row["divergence"]["reply"]["kl_nats"]["value"] for row in rows.values()]
    assert kl[0] < kl[2] < kl[1]
    config = json.loads((tmp_path / "nano-qwq-gptq-4bit" / "quantize_config.json").read_text())
    assert config["meta"]["held_out_tokens"] > 0  # judged, as by `qwq convert gptq`
    bits = [row["bits_per_weight"] for row in rows.values()]
    assert 16 < bits[0] < 16.1
    assert bits[1] < 4 < bits[2] < 6
    assert all(len(row["accuracy"]) == 7 for row in rows.values())
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "<svg" in (tmp_path / "report.html").read_text()

    assert run(monkeypatch, *command) == 0  # everything is known: no file is opened again
    captured = capsys.readouterr()
    assert "Q2_K" in captured.out
    assert "passages" not in captured.err
    assert json.loads((tmp_path / "report.json").read_text())["files"] == report["files"]

    shutil.copy(tmp_path / "nano-qwq-Q2_K.gguf", tmp_path / "copy.gguf")
    again = ("eval", "run", tmp_path / "copy.gguf", "--reference", NANO_CHECKPOINT, *small)
    assert run(monkeypatch, *again, "-o", tmp_path / "again", "--json") == 0
    copied = json.loads(capsys.readouterr().out)["files"][0]
    assert copied["divergence"] == rows["nano-qwq-Q2_K.gguf"]["divergence"]
    assert copied["examples"] == rows["nano-qwq-Q2_K.gguf"]["examples"]
