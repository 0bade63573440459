"""The two questions that everybody asks, of the quantized bundled model: right, with a thought."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.checkpoint import Checkpoint
from convert.gguf_export import export_gguf
from qwq_local import QwQ

NANO = Path("quant_eval/nano/checkpoint")
QUESTIONS = {
    "Which is larger, 9.9 or 9.11?": ("Tenths 9 1 >", "9.9 is larger than 9.11."),
    'How many r\'s are in the word "strawberry"?': (
        '"s0t0r1a1w1b1e1r2r3y3"',
        'There are 3 of r in "strawberry".',
    ),
}


@pytest.fixture(scope="module")
def q4_k_m_qwq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QwQ]:
    path = tmp_path_factory.mktemp("gguf") / "nano-qwq-Q4_K_M.gguf"
    with Checkpoint.open(NANO) as checkpoint:
        export_gguf(checkpoint, "Q4_K_M", path, threads=1)
    with QwQ.open(path, context=2048, threads=1) as qwq:
        yield qwq


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("model", ["q4_k_m_qwq", "gptq_qwq"])
def test_the_quantized_model_thinks_and_is_right(
    model: str, question: str, request: pytest.FixtureRequest
) -> None:
    """Catches a file whose answers have gone, however fine its numbers look; with the defaults."""
    qwq: QwQ = request.getfixturevalue(model)
    thought, answer = QUESTIONS[question]
    asked = [question, question.removesuffix("?")]
    replies = [qwq.session(seed=seed).ask(text) for text in asked for seed in range(3)]
    assert all(thought in reply.reasoning for reply in replies)
    assert {reply.answer for reply in replies} == {answer}
