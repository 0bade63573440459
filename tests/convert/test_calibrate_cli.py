"""`qwq calibrate` as a user meets it: its plan and its progress."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from convert.calibrate_cli import app


def calibrate(*arguments: str | int | Path) -> Result:
    """Run the command in this process; errors come out as they are, main makes lines of them."""
    given = [*map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, given, catch_exceptions=False)


def in_words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(("tokens", "is_warned"), [(2200, True), (4000, False)])
def test_the_plan_says_whether_the_tokens_are_enough(
    small: Path, tmp_path: Path, tokens: int, is_warned: bool
) -> None:
    """Catches hours of Hessians that overfit, of which a user hears when they are used."""
    options = ("--hessians", "--tokens", tokens, "--hessian-tokens", tokens)
    run = calibrate(small, "-o", tmp_path / "out", *options, "--dry-run")
    assert "for each of up to 512 columns, judged by" in in_words(run.stdout)
    assert ("fewer than 4 overfit; give more tokens" in in_words(run.stdout)) == is_warned
