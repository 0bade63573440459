"""The report's rows: which 16-bit file each is held against, and what it is told of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from quant_eval import pipeline
from quant_eval.compare_cli import differences
from quant_eval.divergence import TokenScores
from quant_eval.manifest import Manifest
from quant_eval.measurement import Measured
from quant_eval.results import Attempt, EvaluationSettings
from quant_eval.rows import distinct_names, file_result, find_exact, find_floor
from tests.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", config={"num_hidden_layers": 1}
    )


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    """A BF16 and a Q4_K_M file, and the checkpoint itself."""
    made = {name: folder.parent / f"tiny-{name}.gguf" for name in ("BF16", "Q4_K_M")}
    with Checkpoint.open(folder) as checkpoint:
        for name, path in made.items():
            export_gguf(checkpoint, name, path, threads=1)
    return {**made, "folder": folder}


def scores(kl: float) -> dict[str, TokenScores]:
    """Nine passages of five tokens."""
    kls, none, same = np.full(5, kl), np.zeros(5), np.ones(5, dtype=np.bool_)
    return {str(i): TokenScores(kls * (1 + i), none, none, same, ~same, 3) for i in range(9)}


def replies(
    solved: dict[str, str], *, n_tokens: int = 10, speed: float = 20.0, at_once: int = 1
) -> tuple[Attempt, ...]:
    """For each problem a reply a letter: y is solved, n is not, ? was not graded."""
    return tuple(
        Attempt(
            problem=problem,
            kind="letters",
            question=problem,
            correct={"y": True, "n": False, "?": None}[letter],
            reasoning=f"{problem}{seed}",
            answer=letter,
            finish_reason="stop",
            notices=(),
            thought_tokens=n_tokens + len(problem),
            elapsed_s=1.0,
            first_token_s=0.1,
            tokens_per_s=speed + seed,
            seed=seed,
            at_once=at_once,
        )
        for problem, letters in solved.items()
        for seed, letter in enumerate(letters)
    )


def measured(path: Path | None, kl: float, attempts: tuple[Attempt, ...] = ()) -> Measured:
    name = "server" if path is None else path.name
    return Measured(name, path, f"{name} {kl}", scores(kl) if path else {}, attempts, (), 1.0)


def test_noise_is_of_the_same_engine(files: dict[str, Path]) -> None:
    """Catches llama.cpp's noise beside a folder that transformers runs, and the other way."""
    exact, quantized = measured(files["BF16"], 1e-7), measured(files["Q4_K_M"], 0.02)
    whole = measured(files["folder"], 3e-5)
    every = [quantized, exact, whole]
    assert find_floor(every, "llama.cpp") is exact
    assert find_floor(every, "transformers") is whole
    assert find_floor([quantized, exact], "transformers") is None
    assert find_floor([replace(exact, scores={})], "llama.cpp") is None
    row = file_result(quantized, floor=exact)
    assert row.floor is not None
    assert row.floor.name == "tiny-BF16.gguf"
    assert row.floor.divergence["reply"].kl_nats.value == pytest.approx(5e-7)
    assert file_result(exact, floor=exact).floor is None
    assert file_result(whole, floor=measured(files["folder"], 4e-5)).floor is None


def test_each_side_of_a_comparison_has_its_own_noise(files: dict[str, Path]) -> None:
    """Catches the first file's noise beside the second's number where another engine ran it."""
    quantized, whole = measured(files["Q4_K_M"], 0.02), measured(files["folder"], 3e-5)
    floors = {"llama.cpp": measured(files["BF16"], 1e-7), "transformers": whole}
    rows = {row["name"]: row for row in differences(quantized, whole, floors)}
    assert rows["kl"]["floor"] == pytest.approx(5e-7)
    assert rows["kl"]["second_floor"] == pytest.approx(1.5e-4)
    alike = differences(quantized, quantized, floors)
    assert not any("second_floor" in row for row in alike)
    (only,) = (
        row
        for row in differences(quantized, whole, {**floors, "transformers": None})
        if row["name"] == "kl"
    )
    assert "second_floor" not in only


def test_replies_are_held_against_a_16_bit_file(files: dict[str, Path]) -> None:
    """Catches a file held against itself, and few problems said not to be compared at all."""
    solved = {f"{i}": "y" for i in range(12)}
    lost = solved | {"3": "n", "4": "n"}
    exact = measured(files["BF16"], 1e-7, replies(solved))
    quantized = measured(files["Q4_K_M"], 0.02, replies(lost, n_tokens=13))
    assert find_exact([quantized, exact], "transformers") is exact  # none of its own is there
    assert find_exact([replace(exact, attempts=()), quantized], "llama.cpp") is None
    row = file_result(quantized, exact=exact)
    assert row.task_loss is not None
    assert row.task_loss.value == pytest.approx(-2 / 12)
    assert row.task_loss.low is not None
    assert file_result(exact, exact=exact).task_loss is None
    few = replace(quantized, attempts=quantized.attempts[:7])
    loss = file_result(few, exact=exact).task_loss
    assert loss is not None
    assert (loss.low, loss.high, loss.n) == (None, None, 7)


def test_longer_thoughts_are_paired_by_problem(files: dict[str, Path]) -> None:
    """Catches a difference of means whose error forgets that both had the same problems."""
    names = ["x" * (1 + 7 * i) for i in range(12)]  # of very different lengths
    exact = measured(files["BF16"], 1e-7, replies(dict.fromkeys(names, "yy")))
    longer = measured(files["Q4_K_M"], 0.02, replies(dict.fromkeys(names, "yy"), n_tokens=13))
    change = file_result(longer, exact=exact).thought_change
    assert change is not None
    assert change.value == pytest.approx(3.0)
    assert change.n == 12
    assert change.standard_error == pytest.approx(0.0)
    assert file_result(exact, exact=exact).thought_change is None


def test_flips_are_more_than_the_luck_of_a_seed(files: dict[str, Path]) -> None:
    """Catches any solved reply set against any failed one, and the surest flip left out."""
    before = {"a": "yyyy", "b": "yyyy", "c": "ynyn", "d": "yyyn", "e": "yyyy", "f": "yyyy"}
    after = {"a": "yyyn", "b": "nyny", "c": "nyny", "d": "nnnn", "e": "nnnn", "f": "nnn?"}
    exact = measured(files["BF16"], 1e-7, replies(before))
    quantized = measured(files["Q4_K_M"], 0.02, replies(after))
    flips = file_result(quantized, exact=exact).flips
    found = [(one.question, one.n_reference_solved, one.n_solved, one.n_replies) for one in flips]
    assert found == [("e", 4, 0, 4), ("f", 3, 0, 3), ("d", 3, 0, 4)]
    (flip,) = (one for one in flips if one.question == "d")
    assert (flip.reference_reasoning, flip.reasoning) == ("d0", "d0")  # of one seed
    assert (flip.reference_answer, flip.answer) == ("y", "n")
    lucky = measured(files["Q4_K_M"], 0.02, replies({"a": "yyyn", "b": "nyyy"}))
    assert file_result(lucky, exact=exact).flips == ()
    once = measured(files["BF16"], 1e-7, replies({"a": "y", "b": "n"}))
    other = measured(files["Q4_K_M"], 0.02, replies({"a": "n", "b": "y"}))
    assert [one.question for one in file_result(other, exact=once).flips] == ["a"]
    seeded = replace(other, attempts=tuple(replace(one, seed=9) for one in other.attempts))
    assert file_result(seeded, exact=once).flips == ()


def test_speed_says_how_many_were_asked_at_once() -> None:
    """Catches the speed of a busy server shown as that of one reply at a time."""
    one = measured(None, 0.0, replies({"a": "yyy", "b": "yyy"}, at_once=8))
    speed = file_result(one).speed
    assert speed is not None
    assert speed.at_once == 8
    assert (speed.tokens_per_s.value, speed.tokens_per_s.n) == (21.0, 6)
    assert speed.tokens_per_s.standard_error is not None


def test_a_row_tells_its_recipe(files: dict[str, Path]) -> None:
    """Catches a file that says by what it was made, and a report that does not."""
    recipe = file_result(measured(files["Q4_K_M"], 0.02)).recipe
    assert recipe is not None
    assert 'name = "Q4_K_M"' in recipe
    assert file_result(measured(files["folder"], 0.0)).recipe is None


def test_files_of_one_name_stay_apart(folder: Path, tmp_path: Path) -> None:
    """Catches layer errors and rows under the other file's name."""
    paths = [tmp_path / name / "model.gguf" for name in ("first", "second")]
    with Checkpoint.open(folder) as checkpoint:
        for recipe, path in zip(("BF16", "Q2_K"), paths, strict=True):
            path.parent.mkdir()
            export_gguf(checkpoint, recipe, path, threads=1)
        found = [measured(path, 0.02) for path in paths]
        assert distinct_names(found) == ["first/model.gguf", "second/model.gguf"]
        assert distinct_names([found[0], measured(folder, 0.0)]) == ["model.gguf", "tiny"]
        assert distinct_names([found[0], found[0]])  # the same file twice cannot be told apart
        ask = pipeline.Ask(EvaluationSettings(n_tokens=50), None)
        errors = {
            path: pipeline.errors_by_layer(
                checkpoint,
                path,
                Manifest(tmp_path / "out"),
                ask,
                n_tokens=20,
                threads=1,
                on_progress=lambda *_: None,
            )
            for path in paths
        }
        report = pipeline.make_report(checkpoint, Manifest(tmp_path / "out"), ask, found, errors)
    assert [one.name for one in report.files] == ["first/model.gguf", "second/model.gguf"]
    for row, path in zip(report.files, paths, strict=True):
        assert row.layers == errors[path]
    first, second = (one.layers for one in report.files)
    assert first is not None
    assert second is not None
    assert first.layers[-1].so_far.value < second.layers[-1].so_far.value / 100
