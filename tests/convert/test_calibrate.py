"""The calibration pass: against a plain run of the whole model, and what must not change it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.calibrate import (
    Calibration,
    CalibrationSettings,
    calibrate,
    open_calibration,
    plan_calibration,
)
from convert.calibration import Conversation, PlainText
from convert.checkpoint import Checkpoint
from convert.errors import (
    CheckpointError,
    DiskFullError,
    OutputExistsError,
    QwqError,
    UsageError,
)
from convert.files import partial_path
from convert.imatrix import read_imatrix
from convert.layer_stream import INPUT_SITES, LayerStream, find_device
from convert.layer_work import LayerWork
from convert.passages import calibration_sequences
from convert.qwen2 import tensor_specs
from tests.processes import largest_file
from tests.synthetic import Array, sums, write_checkpoint

ROOT = Path(__file__).parents[2]
N_LAYERS = 3
SETTINGS = CalibrationSettings(hessians=True, batch_tokens=256)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config: dict[str, object] = {"num_hidden_layers": N_LAYERS}
    return write_checkpoint(tmp_path_factory.mktemp("calibrate") / "source", config=config)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(source, tmp_path_factory.mktemp("calibrate") / "out").path


def run(
    source: Path,
    out: Path,
    *,
    settings: CalibrationSettings = SETTINGS,
    passages: Sequence[Conversation | PlainText] | None = None,
    stop_after: int | None = None,
    force: bool = False,
    device: str = "cpu",
) -> Calibration:
    """Calibrate; stop_after: interrupt once so many tokens are done."""

    def on_progress(done: int, total: int) -> None:
        if stop_after is not None and done > stop_after:
            raise KeyboardInterrupt

    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(
            checkpoint,
            out,
            passages=sums(16) if passages is None else passages,
            settings=settings,
        )
        return calibrate(plan, device=device, force=force, on_progress=on_progress)


def statistics(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint.open(source) as checkpoint:
        calibration = open_calibration(folder, checkpoint)
    return {
        f"{index}.{site}.{name}": tensor
        for index in range(N_LAYERS)
        for site in INPUT_SITES
        for name, tensor in calibration.statistics(index, site).items()
    }


def whole_run(source: Path) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Every linear's inputs, (n_tokens, n_in) float64, one sequence after the other, by hooks."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, linear in model.named_modules():
        if name.endswith("_proj"):
            seen[name] = []
            linear.register_forward_pre_hook(
                lambda _, inputs, kept=seen[name]: kept.append(inputs[0][0].double())
            )
    with Checkpoint.open(source) as checkpoint:
        sequences = calibration_sequences(checkpoint, sums(16), n_tokens=None)
    with torch.no_grad():
        for ids in sequences:
            model(torch.tensor([list(ids)]))
    return {name: torch.cat(inputs) for name, inputs in seen.items()}, [*map(len, sequences)]


def test_statistics_equal_a_plain_run_with_hooks(source: Path, finished: Path) -> None:
    """Catches padding counted, a linear given another's inputs, a layer fed the wrong states."""
    inputs, lengths = whole_run(source)
    is_held_out = torch.cat([torch.full((n,), i % 8 == 7) for i, n in enumerate(lengths)])
    imatrix = read_imatrix(finished / "imatrix.gguf")
    with Checkpoint.open(source) as checkpoint:
        gguf_names = {spec.name: spec.gguf_name for spec in tensor_specs(checkpoint.model)}
        calibration = open_calibration(finished, checkpoint)
    assert calibration.n_tokens == sum(lengths)
    assert calibration.n_held_out == int(is_held_out.sum())
    assert calibration.n_fitted == calibration.n_tokens - calibration.n_held_out
    assert len(imatrix.importance) == len(inputs) == 7 * N_LAYERS
    for name, expected in inputs.items():
        ours = imatrix.importance[gguf_names[f"{name}.weight"]]
        np.testing.assert_allclose(ours, expected.square().mean(dim=0), rtol=1e-4)
    for index in range(N_LAYERS):
        for site in INPUT_SITES:
            kept = calibration.statistics(index, site)
            expected = inputs[f"model.layers.{index}.{site}"]
            fitted, held_out = expected[~is_held_out], expected[is_held_out]
            hessian = 2 * fitted.T @ fitted / len(fitted)
            scale = float(hessian.diagonal().mean())
            torch.testing.assert_close(kept["hessian"].double(), hessian, rtol=0, atol=1e-4 * scale)
            torch.testing.assert_close(
                kept["held_out"].double().square().sum(dim=0),
                held_out.square().sum(dim=0),
                rtol=1e-4,
                atol=0,
            )


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_batch_size_does_not_matter(
    source: Path, finished: Path, tmp_path: Path, batch_tokens: int
) -> None:
    """Catches a mean of means, and padding that leaks."""
    settings = CalibrationSettings(hessians=True, batch_tokens=batch_tokens)
    out = run(source, tmp_path / "out", settings=settings).path
    assert_equal(statistics(source, out), statistics(source, finished), tolerance=1e-5)


def assert_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float
) -> None:
    """tolerance: of the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, ours in expected.items():
        atol = tolerance * float(ours.abs().max())
        torch.testing.assert_close(found[name], ours, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("first", ["longest", "held out"])
def test_the_order_of_batches_does_not_matter(
    source: Path, finished: Path, tmp_path: Path, first: str
) -> None:
    """Catches statistics in which the first or the last batch weighs more.

    Batches come in order of length; here from behind, or all parts of the text from behind.
    """
    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(checkpoint, tmp_path / "out", passages=sums(16), settings=SETTINGS)
        parts = plan.parts[::-1] if first == "held out" else plan.parts
        assert all(len(part.batches) > 1 for part in parts if part.fitted or part.held_out)
        turned = tuple(replace(part, batches=part.batches[::-1]) for part in parts)
        calibrate(replace(plan, parts=turned))
    found, expected = statistics(source, tmp_path / "out"), statistics(source, finished)
    for kept in (found, expected):
        for name in kept:
            if name.endswith("held_out"):  # kept whole, a row a token, in the order of batches
                kept[name] = kept[name].T @ kept[name]
    assert_equal(found, expected, tolerance=1e-5)


def test_a_device_finds_the_same(source: Path, finished: Path, tmp_path: Path, device: str) -> None:
    """Catches a device that computes in fewer bits, or states left on another."""
    settings = replace(SETTINGS, sensitivities=True, n_sensitivity_tokens=1000)
    found, expected = (
        run(source, tmp_path / name, settings=settings, device=name).path
        for name in (device, "cpu")
    )
    assert_equal(statistics(source, found), statistics(source, expected), tolerance=1e-3)


@pytest.mark.parametrize("part", [0.0, 0.2, 0.34, 0.5, 0.99])
def test_interruption_does_not_matter(
    source: Path, finished: Path, tmp_path: Path, part: float
) -> None:
    """Catches a layer done twice, left out, or begun from half-written states."""
    with Checkpoint.open(source) as checkpoint:
        n_tokens = open_calibration(finished, checkpoint).n_tokens
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after=int(part * N_LAYERS * n_tokens))
    assert not out.exists()
    assert partial_path(out).exists() == (part > 0.33)
    run(source, out)
    assert not partial_path(out).exists()
    names = sorted(path.name for path in finished.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_15_random_moments(tmp_path: Path) -> None:
    """SIGKILL anywhere: no folder under its final name but a whole one; continued, the same bytes.

    Catches a journal that promises what is not written, and files of a layer or a step removed
    before the journal does without them.
    """
    command = [sys.executable, "-m", "tests.interrupted_calibration", str(tmp_path), "15"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert not done.returncode, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] == 15
    assert report["continued"] >= 4
    assert report["done"] >= 1


def test_a_full_disk_is_not_the_end(source: Path, finished: Path, tmp_path: Path) -> None:
    """The disk takes no statistics: a typed error; with room again, the same files and no other.

    Catches a writer whose unfinished file, under a name of its own, gets into the folder.
    """
    out = tmp_path / "out"
    layer_nbytes = (finished / "layer-000.safetensors").stat().st_size
    with (
        largest_file(layer_nbytes - 1),
        pytest.raises(DiskFullError, match="holds no file of this size"),
    ):
        run(source, out)
    assert not out.exists()
    run(source, out)
    assert {one.name: one.read_bytes() for one in out.iterdir()} == {
        one.name: one.read_bytes() for one in finished.iterdir()
    }


def test_finished_layers_are_not_run_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a continuation that begins anew in secret."""
    loaded: list[int] = []
    load_layer = LayerStream.load_layer

    def counting(stream: LayerStream, index: int) -> object:
        loaded.append(index)
        return load_layer(stream, index)

    monkeypatch.setattr(LayerStream, "load_layer", counting)
    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(checkpoint, tmp_path / "out", passages=sums(16), settings=SETTINGS)
        total = N_LAYERS * plan.result.n_tokens

        def stop(done: int, _: int) -> None:
            if done > 0.7 * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(plan, on_progress=stop)
        loaded.clear()
        calibrate(plan)
    assert loaded == [2]


def test_what_is_done_takes_no_room_again(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a continuation refused on the disk that its first part has almost filled."""
    out = tmp_path / "out"
    with Checkpoint.open(source) as checkpoint:
        n_tokens = open_calibration(finished, checkpoint).n_tokens
        plan = plan_calibration(checkpoint, out, passages=sums(16), settings=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after=int(2.5 * n_tokens))
    n_there = sum(path.stat().st_size for path in partial_path(out).iterdir())
    for n_free, is_enough in ((n_there // 2, False), (plan.disk_nbytes - n_there, True)):
        monkeypatch.setattr("convert.files.free_space", lambda _, n_free=n_free: n_free)
        if is_enough:
            run(source, out)
        else:
            with pytest.raises(DiskFullError, match=f"{n_free:,} are free"):
                run(source, tmp_path / "anew")
    assert out.exists()


@pytest.mark.parametrize("sensitivities", [False, True])
def test_the_disk_that_is_taken_is_what_was_counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sensitivities: bool
) -> None:
    """Catches hidden states, their padding or what rides along left out of the plan."""
    taken: list[int] = []
    finish_layer = LayerWork.finish_layer

    def weighing(work: LayerWork, *files: Path) -> None:
        taken.append(sum(path.stat().st_size for path in work.folder.iterdir()))
        finish_layer(work, *files)

    monkeypatch.setattr(LayerWork, "finish_layer", weighing)
    settings = CalibrationSettings(
        hessians=True, sensitivities=sensitivities, n_sensitivity_tokens=1000, batch_tokens=3000
    )
    with Checkpoint.open(source) as checkpoint:
        plan = plan_calibration(
            checkpoint,
            tmp_path / "out",
            passages=sums(16),
            settings=settings,
            evaluation=sums(24)[16:],
        )
        calibrate(plan)
    assert max(taken) < plan.disk_nbytes + 10_000  # of headers and a journal
    assert max(taken) == pytest.approx(plan.disk_nbytes, rel=0.05)


def test_other_unfinished_work_is_not_discarded(source: Path, tmp_path: Path) -> None:
    """Catches hours of work lost to a mistyped command, and layers of two runs mixed."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(source, out, stop_after=3000)
    with pytest.raises(OutputExistsError, match=r"1 finished layers.*--force"):
        run(source, out, settings=CalibrationSettings(hessians=False))
    run(source, out, settings=CalibrationSettings(hessians=False), force=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.json",
        "imatrix.dat",
        "imatrix.gguf",
    ]


def test_both_formats_say_the_same(finished: Path) -> None:
    """Catches a sum where the other format has a mean."""
    modern = read_imatrix(finished / "imatrix.gguf")
    legacy = read_imatrix(finished / "imatrix.dat")
    assert modern.importance.keys() == legacy.importance.keys()
    for name, values in modern.importance.items():
        np.testing.assert_allclose(legacy.importance[name], values, rtol=1e-6)


def test_first_tokens_alone(source: Path, tmp_path: Path) -> None:
    """Catches --tokens that counts sequences, and Hessians of more text than was asked for."""
    settings = CalibrationSettings(n_tokens=1500, hessians=True, n_hessian_tokens=1000)
    calibration = run(source, tmp_path / "out", settings=settings)
    assert calibration.n_tokens == 1500
    assert 1000 <= calibration.n_fitted + calibration.n_held_out < 1200
    assert calibration.n_held_out > 0


def test_plain_text_is_split_not_cut(source: Path, tmp_path: Path) -> None:
    """Catches a book of which only the first page counts."""
    text = PlainText("one two three " * 1000)
    calibration = run(source, tmp_path / "out", passages=[text], settings=CalibrationSettings())
    assert calibration.n_tokens > 4096


def test_a_calibration_belongs_to_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Catches statistics of one model used for another of the same shapes."""
    config: dict[str, object] = {"num_hidden_layers": N_LAYERS}
    other = write_checkpoint(tmp_path / "other", config=config, seed=1)
    with Checkpoint.open(other) as checkpoint:
        with pytest.raises(QwqError, match="calibrate this checkpoint"):
            open_calibration(finished, checkpoint)
        with pytest.raises(QwqError, match="qwq calibrate"):
            open_calibration(tmp_path, checkpoint)


def test_a_cut_statistics_file_is_an_error(source: Path, finished: Path, tmp_path: Path) -> None:
    """Catches a reader's own exception that reaches the user."""
    shutil.copytree(finished, tmp_path / "cut")
    path = tmp_path / "cut" / "layer-001.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with Checkpoint.open(source) as checkpoint:
        calibration = open_calibration(tmp_path / "cut", checkpoint)
    with pytest.raises(QwqError, match=r"layer-001.*again"):
        calibration.statistics(1, "mlp.down_proj")


def test_broken_weights_keep_finished_layers(tmp_path: Path) -> None:
    """Catches an error without the tensor's name, and a folder under the final name."""

    def damage(tensors: dict[str, Array]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan

    config: dict[str, object] = {"num_hidden_layers": 2}
    source = write_checkpoint(tmp_path / "source", config=config, edit=damage)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        run(source, tmp_path / "out")
    journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())
    assert journal["n_done"] == 1
    assert not (tmp_path / "out").exists()


def test_too_little_text_for_hessians_is_an_error(source: Path, tmp_path: Path) -> None:
    """Catches a damping chosen on nothing."""
    with pytest.raises(UsageError, match="too few"):
        run(source, tmp_path / "out", passages=sums(16)[:5])
    assert list(tmp_path.iterdir()) == []


def test_sites_are_every_linear() -> None:
    """Catches a linear without importance."""
    linears = [linear for names in INPUT_SITES.values() for linear in names]
    assert len(set(linears)) == len(linears) == 7


def test_an_absent_device_is_an_error() -> None:
    """Catches a fall back to the CPU in silence."""
    assert find_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="is not here; give one of"):
        find_device("xpu")
