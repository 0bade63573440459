"""`qwq calibrate --self-generate`: a model's own thoughts become what it is calibrated on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.calibrate_cli import app
from convert.calibration import load_conversations, set_digest
from convert.errors import QwqError, UsageError
from qwq_local.self_generate import self_generate

NANO_CHECKPOINT = Path(__file__).parents[2] / "quant_eval/nano/checkpoint"

ROOT = Path(__file__).parents[2]
PROMPTS = ("What is 3 + 4?", "Which is larger, 9.9 or 9.11?", "What is 12 + 7?")


@pytest.mark.slow
def test_the_model_writes_its_own_text(bf16_gguf: Path, tmp_path: Path) -> None:
    """Catches replies that are made and not used, made twice, or lost with an interruption."""
    text = tmp_path / "text.jsonl"
    records = [
        {"messages": [{"role": "user", "content": one}], "reasoning": "Hm.", "answer": "Oh."}
        for one in PROMPTS
    ]
    text.write_text("\n".join(map(json.dumps, records)))
    given = ("--text", text, "--tokens", 100, "--device", "cpu", "--model", bf16_gguf, "--json")
    out = tmp_path / "out"

    def arguments(n: int) -> list[str]:
        return [*map(str, (NANO_CHECKPOINT, "-o", out, *given, "--self-generate", n, "--force"))]

    program = [sys.executable, "-m", "qwq_local.cli", "calibrate", *arguments(1)]
    first = subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert first.returncode == 0, first.stderr
    kept = tmp_path / "out.self-generated.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1
    made = json.loads(lines[0])
    assert made["messages"][0]["content"] == PROMPTS[0]
    assert len(made["reasoning"]) > len("Hm.")
    assert made["answer"]
    # What was kept is not made again.
    again = CliRunner().invoke(app, arguments(2), obj=self_generate, catch_exceptions=False)
    assert kept.read_text(encoding="utf-8").splitlines()[:1] == lines
    replies = load_conversations(kept)
    assert [one.messages[0]["content"] for one in replies] == [*PROMPTS[:2]]
    digest = set_digest([*replies, load_conversations(text)[2]])
    assert json.loads(again.stdout)["calibration_sha256"] == digest
    assert json.loads(first.stdout)["calibration_sha256"] != digest
    with pytest.raises(UsageError, match="has 3 prompts without tools"):
        CliRunner().invoke(app, arguments(4), obj=self_generate, catch_exceptions=False)
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, records[::-1])))
    with pytest.raises(QwqError, match="replies to other prompts"):
        CliRunner().invoke(app, arguments(2), obj=self_generate, catch_exceptions=False)
