"""A reference on the disk serves what it was made of, and nothing else."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.calibration import load_conversations
from convert.checkpoint import Checkpoint
from convert.errors import QwqError
from quant_eval import suite
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
    short = sorted(load_conversations(suite.EVALUATION_TEXT), key=lambda one: len(one.reasoning))[
        :5
    ]
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
    index = json.loads((tmp_path / "reference.json").read_text())
    (tmp_path / "reference.json").write_text(json.dumps(index | {"format": 99}))
    assert "has format 99" in why_stale(tmp_path, BINDING)


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
