"""What several tests of measurements share: small exams, and models that say what they are told."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from convert.calibration import Conversation
from convert.checkpoint import Checkpoint
from convert.layer_work import passing_work
from quant_eval import suite
from quant_eval.reference import Reference
from quant_eval.reference_store import EvaluationTokens
from quant_eval.results import EvaluationSettings
from quant_eval.tasks import Problem
from qwq_local import QwQ
from qwq_local.local import LocalModel
from tests.fakes import FakeEngine, describe_fake
from tests.synthetic import CHAT_TEMPLATE

SETTINGS = EvaluationSettings(n_tokens=150, n_problems=1, max_tokens=400)


def no_progress(_stage: str, _done: int, _total: int) -> None:
    pass


def telling(*replies: str) -> QwQ:
    return QwQ(LocalModel(FakeEngine(*replies), describe_fake(CHAT_TEMPLATE), Path("fake")))


def worked(problem: Problem) -> str:
    return f"{problem.reasoning}\n</think>\n\n{problem.answer}"


def problems_alone(
    problems: tuple[Problem, ...], settings: EvaluationSettings = SETTINGS
) -> suite.Exam:
    """An exam without text."""
    reference = Reference(cast("Checkpoint", None), ())
    return suite.Exam(EvaluationTokens((), (), ""), reference, problems, settings, "these")


def text_alone(
    checkpoint: Checkpoint, conversations: list[Conversation], settings: EvaluationSettings
) -> suite.Exam:
    """An exam without problems."""
    tokens = suite.tokenize_text(checkpoint, conversations, settings.n_tokens)
    with (
        TemporaryDirectory() as folder,
        passing_work(Path(folder) / "layers", {}) as work,
    ):
        reference = suite.make_reference(checkpoint, tokens, work, on_progress=no_progress)
    return suite.Exam(tokens, reference, (), settings, "these")
