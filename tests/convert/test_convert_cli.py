"""`qwq convert gguf` as a user meets it: streams, exit codes, one-line errors."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from convert.files import partial_path
from convert.gguf_header import read_header
from convert.gguf_output import GgufOutput
from convert.imatrix import write_imatrix
from qwq_local.cli import main
from tests.synthetic import Array, write_checkpoint


class Run(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


Qwq = Callable[..., Run]


@pytest.fixture
def qwq(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Qwq:
    """Run the program in this process."""

    def run(*arguments: str | Path) -> Run:
        monkeypatch.setattr("sys.argv", ["qwq", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        assert isinstance(stopped.value.code, int | None)
        return Run(stopped.value.code or 0, captured.out, captured.err)

    return run


def test_one_type(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """The path goes to stdout, plan and summary to stderr."""
    out = tmp_path / "new" / "x.gguf"
    run = qwq("convert", "gguf", small, "--type", "Q4_K_M", "-o", out, "--threads", "1")
    assert run.exit_code == 0
    assert run.stdout == f"{out}\n"
    assert "bits per weight" in run.stderr
    assert "written in" in run.stderr
    assert read_header(out).metadata["general.file_type"] == 15


def test_several_types_as_json(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """One document on stdout, nothing on stderr with -q, files named by model and type."""
    run = qwq(
        *("convert", "gguf", small, "--type", "q8_0", "--type", "Q2_K"),
        *("-o", tmp_path / "out", "--json", "-q"),
    )
    assert (run.exit_code, run.stderr) == (0, "")
    files = json.loads(run.stdout)["files"]
    assert [Path(file["path"]).name for file in files] == ["small-Q8_0.gguf", "small-Q2_K.gguf"]
    assert [file["nbytes"] for file in files] == [Path(f["path"]).stat().st_size for f in files]


def test_a_type_for_every_tensor(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """An imatrix, a recipe of one's own and single types: all of it is in the file."""
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    importance = {f"blk.0.{name}.weight": np.ones(256, dtype=np.float32) for name in names}
    importance["blk.0.ffn_down.weight"] = np.arange(512, dtype=np.float32)
    write_imatrix(tmp_path / "i.dat", importance, n_tokens=10, dataset="none")
    recipe = tmp_path / "mine.toml"
    recipe.write_text('name = "mine"\nbase = "Q2_K_S"\n', encoding="utf-8")
    arguments = (
        *("convert", "gguf", small, "--type", recipe, "-o", tmp_path),
        *("--tensor-type", "attn_(q|k)=Q8_0", "--output-type", "bf16"),
        *("--token-embedding-type", "Q4_0"),
    )
    run = qwq(*arguments)
    assert run.exit_code == 2
    assert "blk.0.attn_output.weight as Q2_K is useless without" in run.stderr
    run = qwq(*arguments, "--imatrix", tmp_path / "i.dat")
    assert run.exit_code == 0
    assert "imatrix: 7 entries match" in run.stderr
    assert "no entry for token_embd.weight, output.weight" in run.stderr
    assert "rounded without care, in blk.0.ffn_down.weight (1)" in run.stderr
    tensors = read_header(tmp_path / "small-mine.gguf").tensors
    types = {name: tensor.quant_type.name for name, tensor in tensors.items()}
    assert types["token_embd.weight"] == "Q4_0"
    assert types["output.weight"] == "BF16"
    assert types["blk.0.attn_q.weight"] == types["blk.0.attn_k.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q2_K"


def test_dry_run_writes_nothing(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """The plan's bytes are those of the file that a real run writes."""
    arguments = ("convert", "gguf", small, "-o", tmp_path / "out")
    plan = qwq(*arguments, "--dry-run", "--json")
    assert plan.exit_code == 0
    assert not (tmp_path / "out").exists()
    (planned,) = json.loads(plan.stdout)["files"]
    document = json.loads(plan.stdout)
    assert document["disk_needed_nbytes"] == planned["nbytes"] < document["disk_free_nbytes"]
    assert document["memory_nbytes"] > 100_000_000
    assert document["duration_s"] >= 0
    table = qwq(*arguments, "--dry-run").stdout
    row = next(line for line in table.splitlines() if line.startswith(" blk.0.ffn_down.weight"))
    assert row.split() == ["blk.0.ffn_down.weight", "256", "x", "512", "BF16", "Q6_K", "107,520"]
    for line in ("MB needed", "memory: ", "time: about "):
        assert line in table
    qwq(*arguments)
    assert Path(planned["path"]).stat().st_size == planned["nbytes"]
    header = read_header(Path(planned["path"]))
    assert {t["name"]: t["type"] for t in planned["tensors"]} == {
        tensor.name: tensor.quant_type.name for tensor in header.tensors.values()
    }


def test_a_terminal_shows_how_far_it_is(
    qwq: Qwq, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar each for converting and reading back, with bytes done of all, rate and time."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    run = qwq("convert", "gguf", small, "--type", "Q8_0", "-o", tmp_path / "x.gguf")
    assert run.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", run.stderr)
    for title in ("converting", "reading back"):
        done = re.findall(
            rf"{title} .*?([\d.]+)/([\d.]+) [kM]B +(\?|[\d.,]+ \w*B?/s) +[\d:-]+", text
        )
        assert done, text
        assert done[-1][0] == done[-1][1]


def test_parts(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """The first part's path goes to stdout; a size that is none is a usage error."""
    arguments = ("convert", "gguf", small, "--type", "q8_0", "-o", tmp_path / "x.gguf")
    run = qwq(*arguments, "--split-size", "0.3MB")
    assert run.exit_code == 0
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    assert run.stdout == f"{parts[0]}\n"
    assert f"and {len(parts) - 1} more" in " ".join(run.stderr.split())
    for size in ("4", "0GB", "GB", "-1GB"):
        wrong = qwq(*arguments, f"--split-size={size}")
        assert (wrong.exit_code, "give one such as 4GB" in wrong.stderr) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(
    qwq: Qwq, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Ctrl-C and SIGTERM: exit code 130, what to do, no file; the same command goes on."""
    out = tmp_path / "x.gguf"
    arguments = ("convert", "gguf", small, "--type", "q8_0", "-o", out)

    def write_and_interrupt(self: GgufOutput, *arguments: Any, **options: Any) -> None:
        write(self, *arguments, **options)
        self.commit(self.journal())
        os.kill(os.getpid(), number)

    write = GgufOutput.write
    with monkeypatch.context() as patch:
        patch.setattr(GgufOutput, "write", write_and_interrupt)
        run = qwq(*arguments)
    assert (run.exit_code, run.stdout) == (130, "")
    assert run.stderr.endswith("interrupted; the same command continues where it was\n")
    assert not out.exists()
    assert partial_path(out).exists()
    again = qwq(*arguments)
    assert again.exit_code == 0
    assert "unfinished work is there and will be continued" in " ".join(again.stderr.split())
    assert not partial_path(out).exists()


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def spoil_weights(folder: Path) -> None:
    def spoil(tensors: dict[str, Array]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][7, 3] = np.nan

    write_checkpoint(folder, config={"num_hidden_layers": 1}, n_shards=3, edit=spoil)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def change_architecture(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("Qwen2For", "MistralFor"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, "model-00002-of-00003.safetensors: the shard is missing"),
        (cut_shard, "model-00002-of-00003.safetensors: its tensors end at byte"),
        (spoil_weights, "model.layers.0.mlp.up_proj.weight holds nan at [7, 3]"),
        (remove_config, "holds no config.json, so it is no checkpoint"),
        (change_architecture, "the architecture is MistralForCausalLM and Qwen2ForCausalLM is"),
    ],
)
def test_bad_checkpoints(
    qwq: Qwq, small: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """One line with the remedy, exit code 1, nothing under the final name or the partial one."""
    damage(small)
    out = tmp_path / "x.gguf"
    run = qwq("convert", "gguf", small, "-o", out, "-q")
    assert run.exit_code == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert message in run.stderr
    assert "; " in run.stderr
    assert run.stderr.count("\n") == 1
    assert not out.exists()
    assert not partial_path(out).exists()


def test_existing_output(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """Kept without --force, exit code 1; replaced with it."""
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    run = qwq("convert", "gguf", small, "-o", out, "-q")
    assert (run.exit_code, run.stdout) == (1, "")
    assert run.stderr == f"error: {out}: exists already; give --force to replace it\n"
    assert out.read_text() == "precious"
    assert qwq("convert", "gguf", small, "-o", out, "-q", "--force").exit_code == 0
    assert len(read_header(out).tensors) == 15


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(qwq: Qwq, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too small from the start, and filling up on the way: one line each, exit code 1, no file."""
    out = tmp_path / "x.gguf"
    partial_path(out).symlink_to("/dev/full")
    run = qwq("convert", "gguf", small, "-o", out, "-q")
    assert run.exit_code == 1
    assert run.stderr.startswith(f"error: {out}: the disk filled up while it was written; free")
    assert run.stderr.count("\n") == 1
    monkeypatch.setattr("convert.files.free_space", lambda _folder: 10)
    run = qwq("convert", "gguf", small, "-o", out, "-q")
    assert run.exit_code == 1
    assert "bytes are needed and 10 are free; free some space" in run.stderr
    assert not out.exists()


def test_wrong_use(qwq: Qwq, small: Path, tmp_path: Path) -> None:
    """Unknown types, a type twice and one file for two types are usage errors: exit code 2."""
    unknown = qwq("convert", "gguf", small, "--type", "Q4", "-o", tmp_path)
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "give one of F32, F16, BF16" in unknown.stderr
    twice = qwq("convert", "gguf", small, "--type", "Q2_K", "--type", "q2_k", "-o", tmp_path)
    assert (twice.exit_code, "a type is given twice" in twice.stderr) == (2, True)
    types = ("--type", "Q2_K", "--type", "Q8_0")
    one_file = qwq("convert", "gguf", small, *types, "-o", tmp_path / "x.gguf")
    assert (one_file.exit_code, "is one file for 2 types" in one_file.stderr) == (2, True)


def test_help_teaches(qwq: Qwq) -> None:
    """Both helps have an example to start from."""
    run = qwq("convert", "gguf", "--help")
    assert run.exit_code == 0
    assert "Example: qwq convert gguf" in run.stdout
    assert "--dry-run" in run.stdout
    assert "Start with `qwq convert gguf CHECKPOINT --dry-run`" in qwq("convert").stdout
