"""The best mix that fits: against trying them all, and against the stock mixes by measured KL."""

import json
import tomllib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from convert import budget
from convert.budget import CHOICES, Costs, Mix, best_mix, measure_costs, recipe_of, stock_mix
from convert.budget_cli import parse_nbytes
from convert.calibrate import CalibrationSettings, calibrate, plan_calibration
from convert.calibration import load_tokenizer, tokenize_passage
from convert.checkpoint import Checkpoint
from convert.cli import app
from convert.decode import decode_rows
from convert.encode import QuantType, encode_rows
from convert.errors import QwqError, UsageError
from convert.gguf_header import read_header
from convert.imatrix import Imatrix, read_imatrix
from convert.inspect_cli import app as inspect_app
from convert.memory import share_out
from convert.passages import SMALL_VOCABULARY, built_in_passages
from convert.plan import plan_tensors
from convert.qwen2 import Qwen2Config, parse_config, tensor_specs
from convert.recipe import RECIPES
from convert.recipe_file import load_recipe, recipe_text
from quant_eval.suite import read_evaluation_text
from qwq_local.engine import EngineSettings, KvType
from qwq_local.engines.gguf import plan_gguf
from qwq_local.engines.loop import n_logits_rows
from tests.real_shapes import CONFIG as QWQ_CONFIG
from tests.synthetic import CONFIG

NANO = Path(__file__).parents[2] / "quant_eval/nano/checkpoint"
N_PASSAGES = 10  # of the evaluation text


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nano-qwq, with sensitivities."""
    settings = CalibrationSettings(n_tokens=3000, sensitivities=True, n_sensitivity_tokens=2000)
    with Checkpoint.open(NANO) as checkpoint:
        plan = plan_calibration(
            checkpoint,
            tmp_path_factory.mktemp("budget") / "calibration",
            passages=built_in_passages(SMALL_VOCABULARY - 1),
            settings=settings,
        )
        return calibrate(plan).path


@pytest.fixture(scope="module")
def imatrix(calibration: Path) -> Imatrix:
    return read_imatrix(calibration / "imatrix.gguf")


@pytest.fixture(scope="module")
def costs(calibration: Path, imatrix: Imatrix) -> Costs:
    with Checkpoint.open(NANO) as checkpoint:
        return measure_costs(checkpoint, calibration, imatrix, n_threads=2)


@pytest.fixture(scope="module")
def nano() -> Qwen2Config:
    with Checkpoint.open(NANO) as checkpoint:
        return checkpoint.model


def gguf(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["gguf", *map(str, arguments)], catch_exceptions=False)


def divergence_of(mixes: list[Mix], imatrix: Imatrix) -> list[float]:
    """Mean KL from the checkpoint, nats a reply token of held-out conversations."""
    from transformers import Qwen2ForCausalLM

    tokenizer = load_tokenizer(NANO)
    conversations = read_evaluation_text(None)[0][:N_PASSAGES]
    passages = [tokenize_passage(one, tokenizer) for one in conversations]
    model = Qwen2ForCausalLM.from_pretrained(NANO, dtype=torch.float32)

    def predictions() -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                model(torch.tensor([one.ids]))
                .logits[0, one.n_prompt - 1 : one.stop - 1]
                .double()
                .log_softmax(1)
                for one in passages
            ]

    expected, found = predictions(), []
    for mix in mixes:
        weights = {}
        with Checkpoint.open(NANO) as checkpoint:
            for spec in tensor_specs(checkpoint.model):
                if len(spec.shape) > 1:
                    quant_type, n_in = mix.types[spec.gguf_name], spec.shape[-1]
                    importance = imatrix.importance_of(spec.gguf_name, n_in)
                    blocks = encode_rows(
                        checkpoint.read(spec.name), quant_type, importance=importance
                    )
                    stored = decode_rows(blocks, quant_type, n_in)
                    weights[spec.name] = torch.from_numpy(stored)
        model.load_state_dict(weights, strict=False)
        pairs = zip(expected, predictions(), strict=True)
        kls = [(before.exp() * (before - after)).sum(dim=1) for before, after in pairs]
        found.append(float(torch.cat(kls).mean()))
    return found


@pytest.mark.parametrize("name", ["Q4_K_M", "Q3_K_M"])
def test_no_worse_than_the_stock_mix_of_the_same_size(
    nano: Qwen2Config, costs: Costs, imatrix: Imatrix, name: str
) -> None:
    """Measured, not predicted. Catches bits that go where they do no good.

    The mixes differ by a factor of ten and more, so that ten passages tell.
    """
    of_stock = {
        tensor.gguf_name: tensor.quant_type
        for tensor in plan_tensors(nano, RECIPES[name], imatrix=imatrix)
        if len(tensor.shape) > 1
    }
    nbytes = sum(tensor.nbytes for tensor in plan_tensors(nano, RECIPES[name], imatrix=imatrix))
    stock = stock_mix(nano, costs, nbytes, imatrix)
    assert stock is not None
    assert (stock.name, stock.types, stock.nbytes) == (name, of_stock, nbytes)
    mix = best_mix(nano, costs, nbytes, name="fit")
    assert mix.divergence < stock.divergence
    ours, theirs = divergence_of([mix, stock], imatrix)
    assert ours <= theirs


def test_the_mix_is_the_best_of_all() -> None:
    """Catches a solver that was told the wrong thing: all 2,187 mixes are tried."""
    model = parse_config(CONFIG | {"num_hidden_layers": 1, "vocab_size": 320}, "tiny")
    random = np.random.default_rng(5)
    names = [spec.gguf_name for spec in tensor_specs(model) if len(spec.shape) > 1]
    costs = {
        name: {
            one: float(2.0**-i * random.lognormal(0, 3))
            for i, one in enumerate((QuantType.Q3_K, QuantType.Q4_K, QuantType.Q6_K))
        }
        for name in names
    }
    free = ("token_embd.weight", "output.weight")
    costs |= {name: {QuantType.Q6_K: 1e-3} for name in free}
    all_mixes = [
        budget._mix(model, costs, dict(zip(names, types, strict=True)), name="x")
        for types in product(*(costs[name] for name in names))
    ]
    for room in np.quantile([mix.nbytes for mix in all_mixes], np.linspace(0.02, 1, 15)).astype(
        int
    ):
        fitting = [mix for mix in all_mixes if mix.nbytes <= room]
        best = min(fitting, key=lambda mix: mix.divergence)
        found = best_mix(model, costs, int(room), name="x")
        assert found.nbytes <= room
        assert found.divergence == pytest.approx(best.divergence, rel=1e-9)
    with pytest.raises(QwqError, match=r"smallest types take .+ MB .+ are left"):
        best_mix(model, costs, min(mix.nbytes for mix in all_mixes) - 1, name="x")


@pytest.mark.slow
def test_nothing_is_left_to_gain() -> None:
    """Against a table of the best for every size, of QwQ's 450 matrices.

    Catches a solver that ends early: HiGHS takes a ten-thousandth for nothing, unless told
    otherwise, and then misses the best mix here.
    """
    model = parse_config(QWQ_CONFIG, "QwQ-32B")
    random = np.random.default_rng(1)
    specs = [spec for spec in tensor_specs(model) if len(spec.shape) > 1]
    costs: Costs = {
        spec.gguf_name: {
            one: scale * 4.0**-bits * float(random.lognormal(0, 0.03))
            for one, bits in zip(CHOICES, (2.6, 3.4, 4.3, 4.5, 5.5, 6.6, 8.5), strict=True)
        }
        for spec, scale in zip(specs, random.lognormal(0, 1, len(specs)).tolist(), strict=True)
    }
    sizes = [[budget._nbytes(spec, one) for one in CHOICES] for spec in specs]
    max_nbytes = int(0.56 * sum(max(of_one) for of_one in sizes))
    mix = best_mix(model, costs, max_nbytes, name="x")
    assert mix.nbytes <= max_nbytes

    unit = int(np.gcd.reduce(np.concatenate(sizes)))
    room = (max_nbytes - budget._vectors_nbytes(model)) // unit
    best = np.zeros(room + 1)  # by units of room
    for spec, of_one in zip(specs, sizes, strict=True):
        with_one = np.full(room + 1, np.inf)
        for one, nbytes in zip(CHOICES, of_one, strict=True):
            rest = best[: room + 1 - nbytes // unit] + costs[spec.gguf_name][one]
            np.minimum(with_one[nbytes // unit :], rest, out=with_one[nbytes // unit :])
        best = with_one
    assert mix.divergence == pytest.approx(best[-1], rel=1e-9)


def test_a_sample_of_rows_says_the_same(
    calibration: Path, imatrix: Imatrix, costs: Costs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a sample that is not scaled to the matrix, and rows that go by another's weight."""
    monkeypatch.setattr(budget, "SAMPLE_N_WEIGHTS", 1 << 15)
    with Checkpoint.open(NANO) as checkpoint:
        sampled = measure_costs(checkpoint, calibration, imatrix, n_threads=1)
    ratios = [sampled[name][one] / costs[name][one] for name in costs for one in CHOICES]
    assert 0.8 < float(np.median(ratios)) < 1.25
    assert min(ratios) > 0.3
    assert max(ratios) < 3


def test_a_mix_is_a_recipe(nano: Qwen2Config, costs: Costs, tmp_path: Path) -> None:
    """Catches a pattern that takes another layer's matrix, and text that reads back otherwise."""
    mix = best_mix(nano, costs, 2_600_000, name="fit-2.6MB")
    recipe = recipe_of(mix, RECIPES["Q3_K_M"])
    path = tmp_path / "mine.toml"
    path.write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    planned = plan_tensors(nano, recipe)
    found = {one.gguf_name: one.quant_type for one in planned if len(one.shape) > 1}
    assert found == mix.types
    assert sum(one.nbytes for one in planned) == mix.nbytes
    layers = {name: one for name, one in mix.types.items() if name.startswith("blk")}
    assert len(recipe.overrides) < len(layers)


def test_rows_that_fit_no_large_block_get_smaller_ones() -> None:
    """Catches llama.cpp's fallbacks where a type was chosen: rows of 896, as in small Qwen2."""
    small = parse_config(CONFIG | {"hidden_size": 896, "intermediate_size": 4864}, "small")
    odd = parse_config(CONFIG | {"hidden_size": 1000, "intermediate_size": 512}, "odd")
    for spec in tensor_specs(small):
        if len(spec.shape) > 1:
            chosen = budget.choices_for(spec)
            assert (chosen == CHOICES) == (spec.shape[-1] == 4864)
    with pytest.raises(QwqError, match="rows of 1000 do not divide"):
        [budget.choices_for(spec) for spec in tensor_specs(odd) if len(spec.shape) > 1]


def test_memory_is_what_the_runtime_plans_with(nano: Qwen2Config, tmp_path: Path) -> None:
    """Catches two formulas that part: the file that fits here would not load there."""
    file = tmp_path / "q8.gguf"
    gguf(NANO, "--type", "Q8_0", "-o", file)
    kv_types: tuple[KvType, ...] = ("f16", "q8_0")
    for context, kv_type in zip((2048, 8192), kv_types, strict=True):
        settings = EngineSettings(context, 1, "native", kv_type)
        (share, *_) = plan_gguf(file, read_header(file), settings).shares
        room = share_out(nano, 1 << 30, context=context, kv_type=kv_type, margin_nbytes=1)
        assert room.kv_cache == share.kv_nbytes
        handed_out = 2 * 4 * n_logits_rows(nano.vocab_size) * nano.vocab_size  # not on a GPU
        compute_nbytes = share.compute_nbytes - handed_out
        assert compute_nbytes <= room.compute < 1.2 * compute_nbytes
        assert room.weights == (1 << 30) - room.kv_cache - room.compute - 1
    qwq = parse_config(QWQ_CONFIG, "QwQ-32B")
    room = share_out(qwq, 24 << 30, context=32_768, kv_type="q8_0", margin_nbytes=512 << 20)
    assert room.kv_cache == round(4.25 * (1 << 30))
    assert 18.5 < room.weights / (1 << 30) < 19.5


def test_sizes() -> None:
    """Catches GiB taken for GB."""
    assert parse_nbytes("24GiB", "--fit") == 24 << 30
    assert parse_nbytes("0.5 gb", "--fit") == 500_000_000
    assert parse_nbytes("512MiB", "--fit") == 512 << 20
    for text in ("24", "GiB", "0GB", "-1GB", "4XB"):
        with pytest.raises(UsageError, match=f"--fit {text}: is no size"):
            parse_nbytes(text, "--fit")


def test_the_command(calibration: Path, tmp_path: Path) -> None:
    """Catches a plan that is shown and not written, and a recipe that makes another file."""
    fit = ("--fit", "10MB", "--context", "512", "--margin", "1KB", "--calibration", calibration)
    run = gguf(NANO, "-o", tmp_path / "fit.gguf", *fit)
    shown = " ".join(run.stderr.split())
    assert "stock mix that fits" in shown
    assert "for a kv_cache of 512 tokens in f16" in run.stderr
    header = read_header(tmp_path / "fit.gguf")
    assert sum(tensor.nbytes for tensor in header.tensors.values()) < 2_600_000
    assert len({tensor.quant_type for tensor in header.tensors.values()}) > 3
    about = tomllib.loads(str(header.metadata["qwq.recipe"]))["about"]
    assert all(line in shown for line in about.split("; "))
    planned = gguf(NANO, *fit, "-o", tmp_path / "none.gguf", "--dry-run", "--json")
    predicted = json.loads(planned.stdout)["fit"]
    stock, same_size = predicted["stock"], predicted["of_stock_size"]
    share = predicted["predicted_share_of_stock"]
    assert share == same_size["predicted_kl_nats"] / stock["predicted_kl_nats"] < 1
    assert predicted["mix"]["predicted_kl_nats"] <= same_size["predicted_kl_nats"]
    assert same_size["nbytes"] <= stock["nbytes"] <= predicted["max_nbytes"]
    assert f"{share:.2f} of that" in about
    recipe = CliRunner().invoke(inspect_app, [str(tmp_path / "fit.gguf"), "--recipe"])
    (tmp_path / "mine.toml").write_text(recipe.stdout, encoding="utf-8")
    again = ("--type", tmp_path / "mine.toml", "--calibration", calibration)
    gguf(NANO, "-o", tmp_path / "again.gguf", *again)
    assert (tmp_path / "fit.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_what_cannot_be_meant_is_refused(calibration: Path, tmp_path: Path) -> None:
    """Catches types that were asked for and ignored, and a choice made of nothing."""
    with pytest.raises(UsageError, match="--fit 1GB: needs to know"):
        gguf(NANO, "--fit", "1GB")
    with pytest.raises(UsageError, match="leave the options for types out"):
        gguf(NANO, "--fit", "1GB", "--calibration", calibration, "--type", "Q4_K_M")
    with pytest.raises(UsageError, match="--kv q4_0"):
        gguf(NANO, "--fit", "1GB", "--calibration", calibration, "--kv", "q4_0")
    with pytest.raises(QwqError, match=r"0\.000 MB are left for weights"):
        gguf(NANO, "--fit", "100MB", "--calibration", calibration)
