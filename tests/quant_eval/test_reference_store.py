"""A reference on the disk serves what it was made of, and nothing else."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from convert.layer_stream import LayerStream
from quant_eval import suite
from quant_eval.cli import app
from quant_eval.manifest import Manifest
from quant_eval.pipeline import bind, keep_reference
from quant_eval.reference_store import Binding, load_reference, save_reference, why_stale
from tests.quant_eval.measuring import SETTINGS, no_progress, text_alone
from tests.synthetic import CHAT_TEMPLATE, write_checkpoint

BINDING = Binding("ab" * 32, "cd" * 32, 400)


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Iterator[suite.Exam]:
    folder = write_checkpoint(
        tmp_path_factory.mktemp("model") / "tiny", config={"num_hidden_layers": 1}
    )
    conversations, _ = suite.read_evaluation_text(None)
    short = sorted(conversations, key=lambda one: len(one.reasoning))[:5]
    with Checkpoint.open(folder) as checkpoint:
        yield text_alone(checkpoint, short, replace(SETTINGS, n_tokens=400))


def test_what_is_read_back_is_what_was_kept(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches states at another passage, and a cut that keeps too few passages or too many."""
    save_reference(tmp_path, exam.tokens, exam.reference, BINDING)
    tokens, reference = load_reference(tmp_path, exam.reference.checkpoint, BINDING)
    assert tokens == exam.tokens
    for i, states in enumerate(exam.reference.hidden):
        assert (reference.hidden[i] == states).all()
        assert states.dtype == np.float16  # 2 bytes a number: 10 KB a token of QwQ-32B
    fewer, _ = load_reference(tmp_path, exam.reference.checkpoint, replace(BINDING, n_tokens=1))
    assert fewer.passages == exam.tokens.passages[:1]


def test_a_stale_one_is_refused(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches numbers against another checkpoint, another text, or too little of it."""
    assert "make it with `qwq eval reference`" in why_stale(tmp_path, BINDING)
    save_reference(tmp_path, exam.tokens, exam.reference, BINDING)
    assert why_stale(tmp_path, BINDING) == ""
    for wanted, words in (
        (replace(BINDING, checkpoint_sha256="00" * 32), "of a checkpoint with SHA-256 ababababab"),
        (replace(BINDING, evaluation_sha256="00" * 32), "of a text with SHA-256 cdcdcd"),
        (replace(BINDING, n_tokens=401), "holds 400 scored tokens and 401 are wanted"),
    ):
        assert words in why_stale(tmp_path, wanted)
        with pytest.raises(QwqError, match="make it again"):
            load_reference(tmp_path, exam.reference.checkpoint, wanted)


def test_damage_is_seen(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches states of one run under the index of another."""
    save_reference(tmp_path, exam.tokens, exam.reference, BINDING)
    states = np.load(tmp_path / "states.npy")
    states[3, 5] += np.float16(1)
    np.save(tmp_path / "states.npy", states)
    with pytest.raises(QwqError, match="its bytes changed since it was written"):
        load_reference(tmp_path, exam.reference.checkpoint, BINDING)
    assert "its bytes changed since it was written" in why_stale(tmp_path, BINDING)
    index = json.loads((tmp_path / "reference.json").read_text())
    (tmp_path / "reference.json").write_text(json.dumps(index | {"format": 99}))
    assert "has format 99" in why_stale(tmp_path, BINDING)


def without(keys: Sequence[str | int], index: Any) -> None:
    """Take out what the keys lead to."""
    for key in keys[:-1]:
        index = index[key]
    del index[keys[-1]]


def with_another(keys: Sequence[str | int], index: Any) -> None:
    """Put a value of another kind where the keys lead to."""
    for key in keys[:-1]:
        index = index[key]
    index[keys[-1]] = {"of": "another kind"}


KEYS = [
    ("n_tokens",),
    ("sha256",),
    ("opening",),
    ("passages",),
    ("passages", 0),
    *(("passages", 1, key) for key in ("name", "kind", "ids", "n_prompt", "answer_start", "stop")),
    ("passages", 1, "ids", 0),
    ("checkpoint_sha256",),
    ("evaluation_sha256",),
    ("format",),
]


@pytest.mark.parametrize("damage", [without, with_another])
@pytest.mark.parametrize("keys", KEYS)
def test_a_damaged_index_is_an_error_in_words(
    exam: suite.Exam,
    tmp_path: Path,
    keys: Sequence[str | int],
    damage: Callable[[Sequence[str | int], Any], None],
) -> None:
    """Catches a KeyError or a TypeError that reaches the user, and a damaged index that serves."""
    save_reference(tmp_path, exam.tokens, exam.reference, BINDING)
    index = json.loads((tmp_path / "reference.json").read_text())
    damage(keys, index)
    (tmp_path / "reference.json").write_text(json.dumps(index))
    with pytest.raises(QwqError, match="make it again with `qwq eval reference`"):
        load_reference(tmp_path, exam.reference.checkpoint, BINDING)


def test_a_cut_file_is_an_error_in_words(exam: suite.Exam, tmp_path: Path) -> None:
    """Catches a prefix of either file that is read, or another error than ours."""
    save_reference(tmp_path, exam.tokens, exam.reference, BINDING)
    for name in ("reference.json", "states.npy"):
        data = (tmp_path / name).read_bytes()
        for n in (*range(200), *range(200, len(data) - 1, len(data) // 20), len(data) - 2):
            (tmp_path / name).write_bytes(data[:n])
            assert "make it again with `qwq eval reference`" in why_stale(tmp_path, BINDING), n
        (tmp_path / name).write_bytes(data)
    assert why_stale(tmp_path, BINDING) == ""


def test_template_and_tokenizer_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    """Catches states of another rendering: a changed template makes a reference stale."""
    folder = write_checkpoint(tmp_path / "tiny", config={"num_hidden_layers": 1})
    out = tmp_path / "out"

    def binding() -> Binding:
        with Checkpoint.open(folder) as checkpoint:
            found = bind(checkpoint, Manifest(out), None, 20)
            keep_reference(checkpoint, out, found, None, threads=1, on_progress=no_progress)
        return found

    first = binding()
    made = (out / "states.npy").stat().st_mtime_ns
    assert binding() == first
    assert (out / "states.npy").stat().st_mtime_ns == made  # it was right, and is not made again
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"))
    assert binding().checkpoint_sha256 != first.checkpoint_sha256
    assert why_stale(out, first)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("reference") / "tiny", config={"num_hidden_layers": 4}
    )


def keep(
    source: Path, out: Path, *, n_tokens: int = 60, stop_after: int | None = None
) -> tuple[bytes, bytes]:
    """Make the reference; stop_after: interrupt once so many layers are done. Returns its files."""

    def on_progress(_stage: str, done: int, _total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    with Checkpoint.open(source) as checkpoint:
        found = bind(checkpoint, Manifest(out), None, n_tokens)
        keep_reference(checkpoint, out, found, None, threads=1, on_progress=on_progress)
        load_reference(out, checkpoint, found)
    return (out / "states.npy").read_bytes(), (out / "reference.json").read_bytes()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the index of each layer that is loaded."""
    indices: list[int] = []
    load_layer = LayerStream.load_layer

    def counting(stream: LayerStream, index: int) -> object:
        indices.append(index)
        return load_layer(stream, index)

    monkeypatch.setattr(LayerStream, "load_layer", counting)
    return indices


@pytest.mark.parametrize("n_done", [1, 3, 4])
def test_an_interrupted_run_continues_at_its_layer(
    source: Path, tmp_path: Path, loaded: list[int], n_done: int
) -> None:
    """Catches hours that are lost at layer 60 of 64, and states of layers mixed up."""
    with pytest.raises(KeyboardInterrupt):
        keep(source, tmp_path / "out", stop_after=n_done)
    loaded.clear()
    continued = keep(source, tmp_path / "out")
    assert loaded == [0, 1, 2, 3][n_done:]
    assert continued == keep(source, tmp_path / "at-once")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "reference.json", "states.npy"}


@pytest.mark.parametrize("other", ["text", "checkpoint"])
def test_an_interrupted_run_of_another_is_not_continued(
    source: Path, tmp_path: Path, loaded: list[int], other: str
) -> None:
    """Catches states of one text or checkpoint that end as another's."""
    with pytest.raises(KeyboardInterrupt):
        keep(source, tmp_path / "out", stop_after=3)
    n_tokens = 60
    if other == "text":
        n_tokens = 1000
    else:
        source = write_checkpoint(tmp_path / "other", config={"num_hidden_layers": 4}, seed=1)
    loaded.clear()
    found = keep(source, tmp_path / "out", n_tokens=n_tokens)
    assert loaded == [0, 1, 2, 3]
    assert found == keep(source, tmp_path / "at-once", n_tokens=n_tokens)


@pytest.mark.parametrize("name", ["states.npy", "reference.json"])
@pytest.mark.parametrize(
    "damage", ["flipped", "cut", "empty", "gone", "another array", "another type"]
)
def test_what_is_damaged_is_made_again(
    source: Path, tmp_path: Path, name: str, damage: str
) -> None:
    """Catches a reference that is refused by those who use it and right for those who make it."""
    expected = keep(source, tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    elif damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "empty":
        data.clear()
    elif damage == "another type":
        data = data.replace(b"<f2", b"<i2")
    path.write_bytes(data)
    if damage == "another array":
        with path.open("wb") as file:
            np.save(file, np.zeros((3, 4), dtype=np.float16))
    if damage == "gone":
        path.unlink()
    assert keep(source, tmp_path) == expected


def test_force_makes_it_anew(source: Path, tmp_path: Path, loaded: list[int]) -> None:
    """Catches a reference that nothing but removing its files by hand makes again."""
    command = ["reference", str(source), "-o", str(tmp_path), "--tokens", "60"]
    for options, n_loaded in (((), 4), ((), 0), (("--force",), 4)):
        loaded.clear()
        CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
        assert len(loaded) == n_loaded
    with pytest.raises(KeyboardInterrupt):
        keep(source, tmp_path, n_tokens=1000, stop_after=2)
    loaded.clear()
    forced = [*command[:-1], "1000", "--force"]
    CliRunner().invoke(app, forced, catch_exceptions=False)
    assert loaded == [0, 1, 2, 3]
