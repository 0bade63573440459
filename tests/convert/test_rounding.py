"""Sites in real shards' order, what is kept of them, and when the plain encoding stays."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from convert import gguf_export, rounding
from convert.calibrate import Calibration, describe
from convert.checkpoint import Checkpoint, Float32Array
from convert.cli import app
from convert.decode import decode_rows
from convert.encode import ByteArray, QuantType, row_nbytes
from convert.fingerprint import fingerprint
from convert.gguf_export import GgufResult, export_planned
from convert.gguf_header import read_header
from convert.imatrix import write_imatrix
from convert.layer_stream import INPUT_SITES
from convert.plan import FilePlan, plan_file
from convert.qwen2 import tensor_specs
from convert.recipe import RECIPES
from convert.rounding import GptqRounding
from convert.rounding_report import parse_choice, rounding_lines
from tests.oracles.llama_quantizer import stored_tensors
from tests.synthetic import write_checkpoint

N_LAYERS = 2
N_FITTED, N_HELD_OUT = 600, 100
DOWN = "model.layers.0.mlp.down_proj.weight"


def alphabetical(tensors: dict[str, Float32Array]) -> None:
    """As the shards on the hub have them: down, gate, up, k, o, q, v."""
    for name in sorted(tensors):
        tensors[name] = tensors.pop(name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounding") / "model"
    config: dict[str, object] = {"num_hidden_layers": N_LAYERS}
    return write_checkpoint(folder, config=config, edit=alphabetical)


def calibration_of(
    checkpoint: Checkpoint, folder: Path, inputs: Mapping[int, torch.Tensor]
) -> Calibration:
    """Statistics of all sites from inputs by their width: N_FITTED of them, then those held out."""
    folder.mkdir()
    model = checkpoint.model
    for index in range(model.n_layers):
        tensors: dict[str, torch.Tensor] = {}
        for site in INPUT_SITES:
            name = f"model.layers.{index}.{site}.weight"
            rows = inputs[checkpoint.tensors[name].shape[1]]
            fitted = rows[:N_FITTED]
            tensors |= {
                f"{site}.importance": rows.square().mean(dim=0),
                f"{site}.hessian": 2 * fitted.T @ fitted / N_FITTED,
                f"{site}.held_out": rows[N_FITTED:].clone(),
            }
        save_file(tensors, folder / f"layer-{index:03}.safetensors")
    n_tokens = N_FITTED + N_HELD_OUT
    made = Calibration(
        folder,
        fingerprint(checkpoint),
        calibration_sha256="5" * 64,
        n_layers=model.n_layers,
        n_tokens=n_tokens,
        n_fitted=N_FITTED,
        n_held_out=N_HELD_OUT,
        n_sampled=0,
    )
    importance = {
        spec.gguf_name: inputs[spec.shape[1]].square().mean(dim=0).numpy()
        for spec in tensor_specs(model)
        if spec.name.endswith("_proj.weight")
    }
    dataset = f"qwq-local:{made.calibration_sha256}"
    write_imatrix(folder / "imatrix.gguf", importance, n_tokens=n_tokens, dataset=dataset)
    (folder / "calibration.json").write_text(json.dumps(describe(made)))
    return made


def correlated(n_in: int) -> torch.Tensor:
    """Inputs of a kind that GPTQ rounding gains much by."""
    rng = torch.Generator().manual_seed(n_in)
    mixing = torch.randn(n_in, n_in, generator=rng) * torch.logspace(0, -2, n_in)[:, None]
    return torch.randn(N_FITTED + N_HELD_OUT, n_in, generator=rng) @ mixing


@pytest.fixture(scope="module")
def calibration(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    with Checkpoint.open(source) as checkpoint:
        inputs = {n_in: correlated(n_in) for n_in in (256, 512)}
        return calibration_of(checkpoint, tmp_path_factory.mktemp("made") / "statistics", inputs)


@pytest.fixture
def encoded_sites(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    """How often the statistics of each site were asked for: once for each time it is encoded."""
    counts: Counter[tuple[int, str]] = Counter()
    statistics = Calibration.statistics

    def counting(self: Calibration, layer_index: int, site: str) -> dict[str, torch.Tensor]:
        counts[layer_index, site] += 1
        return statistics(self, layer_index, site)

    monkeypatch.setattr(Calibration, "statistics", counting)
    return counts


def wanted_by(plans: list[FilePlan]) -> dict[str, frozenset[QuantType]]:
    return {
        same[0].name: frozenset(tensor.quant_type for tensor in same)
        for same in zip(*(plan.tensors for plan in plans), strict=True)
    }


def errors_of(
    checkpoint: Checkpoint, path: Path, inputs: Mapping[int, torch.Tensor]
) -> dict[str, float]:
    """Squared output errors of a file's matrices on the inputs held out, in float64."""
    header, data = read_header(path), path.read_bytes()
    errors = {}
    for spec in tensor_specs(checkpoint.model):
        if spec.name.endswith("_proj.weight"):
            tensor = header.tensors[spec.gguf_name]
            blocks = np.frombuffer(data[tensor.offset : tensor.offset + tensor.nbytes], np.uint8)
            rows = blocks.reshape(spec.shape[0], -1)
            stored = decode_rows(rows, tensor.quant_type, spec.shape[1])
            difference = checkpoint.read(spec.name).astype(np.float64) - stored
            held_out = inputs[spec.shape[1]][N_FITTED:].double().numpy()
            errors[spec.name] = float(np.square(held_out @ difference.T).sum())
    return errors


def gguf(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["gguf", *map(str, arguments)], catch_exceptions=False)


def planned(
    checkpoint: Checkpoint, calibration: Calibration, folder: Path, names: tuple[str, ...]
) -> tuple[GptqRounding, list[FilePlan]]:
    plain = [plan_file(checkpoint, RECIPES[name], folder / f"{name}.gguf") for name in names]
    rounder = GptqRounding(checkpoint, calibration, wanted_by(plain))
    return rounder, [
        plan_file(checkpoint, plan.recipe, plan.path, row_source=rounder) for plan in plain
    ]


def export(checkpoint: Checkpoint, plans: list[FilePlan], *, threads: int = 32) -> list[GgufResult]:
    return export_planned(checkpoint, plans, threads=threads, slice_n_weights=8192)


def test_every_site_is_encoded_once(
    source: Path,
    calibration: Calibration,
    encoded_sites: Counter[tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a site that the next ones push out while threads still ask for its rows.

    Slices are small and threads many, so that many sites are in work at a time.
    """
    monkeypatch.setattr(rounding, "DAMPS", (0.1,))
    monkeypatch.setattr(rounding, "N_SWEEPS", 0)
    with Checkpoint.open(source) as checkpoint:
        names = "Q4_K_M", "Q4_K_S"
        rounder, plans = planned(checkpoint, calibration, tmp_path, names)
        results = export(checkpoint, plans)
        assert encoded_sites == dict.fromkeys(
            [(index, site) for index in range(N_LAYERS) for site in INPUT_SITES], 1
        )
        for plan, result in zip(plans, results, strict=True):
            assert {(one.name, one.quant_type) for one in result.choices} == {
                (tensor.name, tensor.quant_type)
                for tensor in plan.tensors
                if "_proj.weight" in tensor.name
            }
            assert len(result.choices) == 7 * N_LAYERS
        assert rounder._encoded == {}  # all is let go

        (alone,) = planned(checkpoint, calibration, tmp_path / "alone", ("Q4_K_S",))[1:]
        export(checkpoint, alone, threads=1)
        assert (tmp_path / "alone/Q4_K_S.gguf").read_bytes() == plans[1].path.read_bytes()
    lines = rounding_lines(choice for result in results for choice in result.choices)
    n_q4 = len({one.name for result in results for one in result.choices if one.quant_type == 12})
    assert any(f"of {n_q4} matrices rounded" in line for line in lines if "Q4_K" in line)


def test_memory_is_counted(
    source: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches encodings that outlive their last row, and sites that wait and are not counted."""
    monkeypatch.setattr(rounding, "DAMPS", (0.1,))
    monkeypatch.setattr(rounding, "N_SWEEPS", 0)
    monkeypatch.setattr(rounding, "SLICE_N_WEIGHTS", 8192)
    most = 0
    encode_site = GptqRounding._encode_site

    def watched(self: GptqRounding, layer_index: int, site: str) -> None:
        nonlocal most
        encode_site(self, layer_index, site)
        most = max(most, sum(blocks.nbytes for blocks in self._encoded.values()))

    monkeypatch.setattr(GptqRounding, "_encode_site", watched)
    with Checkpoint.open(source) as checkpoint:
        rounder, plans = planned(checkpoint, calibration, tmp_path, ("Q2_K", "Q4_K_S"))
        gate, up = (wanted_by(plans)[DOWN.replace("down", one)] for one in ("gate", "up"))
        largest = 512 * sum(row_nbytes(one, 256) for one in (*gate, *up))
        assert rounder.kept_nbytes(n_ahead=1) == largest  # what is read before it is let go
        limit = rounder.kept_nbytes(n_ahead=66)
        estimates = [rounder.estimate(n_ahead=n).peak_nbytes for n in (1, 66)]
        assert estimates[1] - estimates[0] == limit - largest > 0
        export(checkpoint, plans)
        assert largest <= most <= limit


def test_what_is_done_is_neither_encoded_again_nor_left_out_of_the_report(
    source: Path,
    calibration: Calibration,
    encoded_sites: Counter[tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a report of what was done since the interruption alone, and finished work redone.

    It comes at q_proj, when k_proj, which shares its inputs, is complete and o_proj perhaps.
    """
    monkeypatch.setattr(gguf_export, "COMMIT_INTERVAL_S", 0.0)
    monkeypatch.setattr(rounding, "DAMPS", (0.1,))
    with Checkpoint.open(source) as checkpoint:
        _, plans = planned(checkpoint, calibration, tmp_path / "whole", ("Q2_K",))
        (whole,) = export(checkpoint, plans)
        encoded_sites.clear()
        assert len(whole.choices) == 7 * N_LAYERS
        rows = GptqRounding.rows

        def stopping(
            self: GptqRounding, name: str, quant_type: QuantType, start: int, stop: int
        ) -> ByteArray | None:
            if name == "model.layers.1.self_attn.q_proj.weight":
                raise KeyboardInterrupt
            return rows(self, name, quant_type, start, stop)

        monkeypatch.setattr(GptqRounding, "rows", stopping)
        rounder, plans = planned(checkpoint, calibration, tmp_path / "cut", ("Q2_K",))
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, plans, threads=1)
        monkeypatch.setattr(GptqRounding, "rows", rows)
        encoded_sites.clear()
        rounder, plans = planned(checkpoint, calibration, tmp_path / "cut", ("Q2_K",))
        (result,) = export(checkpoint, plans, threads=1)
    assert plans[0].path.read_bytes() == (tmp_path / "whole/Q2_K.gguf").read_bytes()
    at_most = {(1, "self_attn.q_proj"): 1, (1, "self_attn.o_proj"): 1}
    assert encoded_sites.items() <= at_most.items()
    assert rounder.choice("model.layers.1.self_attn.k_proj.weight", QuantType.Q2_K) is None
    assert result.choices == whole.choices


def test_none_errs_more_than_the_imatrix_encoding(
    source: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Recomputed from the files. Catches a choice by the wrong measure, and a report made up."""
    inputs = {n_in: correlated(n_in) for n_in in (256, 512)}
    options = ("--type", "Q3_K_S", "--calibration", calibration.path)
    gguf(source, "-o", tmp_path / "plain.gguf", *options)
    run = gguf(source, "-o", tmp_path / "x.gguf", *options, "--rounding", "gptq", "--json")
    with Checkpoint.open(source) as checkpoint:
        plain = errors_of(checkpoint, tmp_path / "plain.gguf", inputs)
        ours = errors_of(checkpoint, tmp_path / "x.gguf", inputs)
    document = json.loads(run.stdout)
    reported = {one["name"]: one for one in document["files"][0]["rounding"]}
    assert reported.keys() == plain.keys()
    for name, error in plain.items():
        assert ours[name] <= error * (1 + 1e-6)
        assert reported[name]["relative_error"] == pytest.approx(ours[name] / error, rel=1e-3)
        assert (reported[name]["damp"] is None) == (ours[name] == error)
    damps = Counter(one["damp"] for one in reported.values())
    shown = " ".join(run.stderr.split())
    n_better = sum(n for damp, n in damps.items() if damp is not None)
    assert n_better > 7
    assert f"Q3_K: {n_better} of {7 * N_LAYERS} matrices rounded" in shown
    for damp, n in damps.items():
        assert damp is None or f"{damp:g} for {n}" in shown


def test_hessians_that_mislead_change_nothing(source: Path, tmp_path: Path) -> None:
    """Catches a choice by the error on the inputs that the Hessian is of: the rest is unlike."""
    inputs = {n_in: correlated(n_in) for n_in in (256, 512)}
    rng = torch.Generator().manual_seed(0)
    for one in inputs.values():  # every column counts, and none goes with another
        one[N_FITTED:] = 20 * torch.randn(N_HELD_OUT, one.shape[1], generator=rng)
    with Checkpoint.open(source) as checkpoint:
        folder = calibration_of(checkpoint, tmp_path / "statistics", inputs).path
    options = ("--type", "Q4_K_S", "--calibration", folder)
    gguf(source, "-o", tmp_path / "plain.gguf", *options)
    run = gguf(source, "-o", tmp_path / "x.gguf", *options, "--rounding", "gptq")
    shown = " ".join(run.stderr.split())
    assert re.search(rf"Q4_K: 0 of {7 * N_LAYERS - 2} matrices rounded .+ Q5_K: 0 of 2", shown), (
        shown
    )
    assert stored_tensors(tmp_path / "x.gguf") == stored_tensors(tmp_path / "plain.gguf")


def twins(n_in: int) -> torch.Tensor:
    """Inputs whose second half repeats the first, ten times smaller: ruinous to make up with."""
    rng = torch.Generator().manual_seed(n_in)
    first = torch.randn(N_FITTED + N_HELD_OUT, n_in // 2, generator=rng)
    noise = torch.randn(N_FITTED + N_HELD_OUT, n_in, generator=rng)
    return torch.cat([first, 0.1 * first], dim=1) + 0.003 * noise


def test_weights_keep_within_the_limits_of_their_type(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours of work thrown away: the exporter refuses tensors far from their source."""
    inputs = {n_in: twins(n_in) for n_in in (256, 512)}
    with Checkpoint.open(source) as checkpoint:
        folder = calibration_of(checkpoint, tmp_path / "statistics", inputs).path
    options = ("--type", "Q4_K_S", "--calibration", folder)
    gguf(source, "-o", tmp_path / "plain.gguf", *options)
    gptq = (*options, "--rounding", "gptq", "--json", "--force")
    found = {}
    for damps in ((0.02,), (0.02, 0.1)):
        monkeypatch.setattr(rounding, "DAMPS", damps)
        run = gguf(source, "-o", tmp_path / "x.gguf", *gptq)
        made = json.loads(run.stdout)["files"][0]["rounding"]
        found[damps] = {one["name"]: one for one in made}[DOWN]
        assert found[damps]["spoiled"]
        assert "farther from the source than the type's should be" in run.stderr
        if len(damps) == 1:
            plain, ours = (stored_tensors(tmp_path / one) for one in ("plain.gguf", "x.gguf"))
            assert ours["blk.0.ffn_down.weight"] == plain["blk.0.ffn_down.weight"]
    assert found[0.02,]["damp"] is None
    assert found[0.02,]["relative_error"] == 1
    assert found[0.02, 0.1]["damp"] == 0.1
    assert found[0.02, 0.1]["relative_error"] < 1


def test_a_device_writes_the_same(source: Path, calibration: Calibration, device: str) -> None:
    """Catches what is left on another device, and float64 where there is none."""
    for quant_type in (QuantType.Q4_K, QuantType.IQ4_XS, QuantType.Q8_0):
        wanted = {DOWN: frozenset({quant_type})}
        with Checkpoint.open(source) as checkpoint:
            found, expected = (
                GptqRounding(checkpoint, calibration, wanted, device=name).rows(
                    DOWN, quant_type, 0, 256
                )
                for name in (device, "cpu")
            )
        assert found is not None
        assert expected is not None
        assert np.mean(found == expected) > 0.95, quant_type


def test_raised_dampings_are_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a damping that was not used: Hessians of fewer tokens than columns have no factor."""
    monkeypatch.setattr(rounding, "DAMPS", (1e-12, 0.1))
    inputs = {n_in: correlated(n_in) for n_in in (256, 512)}
    for one in inputs.values():
        one[20:N_FITTED] = one[:20].repeat(N_FITTED, 1)[: N_FITTED - 20]
    with Checkpoint.open(source) as checkpoint:
        made = calibration_of(checkpoint, tmp_path / "statistics", inputs)
        rounder = GptqRounding(checkpoint, made, {DOWN: frozenset({QuantType.Q2_K})})
        rounder.rows(DOWN, QuantType.Q2_K, 0, 1)
    choice = rounder.choice(DOWN, QuantType.Q2_K)
    assert choice is not None
    ((before, after),) = choice.raised
    assert before == 1e-12 < after
    assert parse_choice(json.loads(json.dumps(asdict(choice)))) == choice
    lines = rounding_lines([choice])
    assert f"damping 1e-12 was too little for the Hessians of 1 matrices and {after:g}" in lines[1]
