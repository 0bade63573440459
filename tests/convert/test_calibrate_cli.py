"""`qwq calibrate` as a user meets it: its plan and its progress."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from convert.calibrate_cli import _bars, app
from convert.estimate import Estimate, estimated_seconds


def calibrate(*arguments: str | int | Path, device: str = "cpu") -> Result:
    """Run the command in this process; errors come out as they are, main makes lines of them.

    Its console is told that it is a terminal.
    """
    given = [*map(str, arguments), "--device", device]
    terminal = {"FORCE_COLOR": "1", "COLUMNS": "200"}
    return CliRunner().invoke(app, given, env=terminal, catch_exceptions=False)


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


def test_the_plan_says_what_the_disk_needs_still(small: Path, tmp_path: Path) -> None:
    """Catches hidden states that nobody was told of, and room asked for twice."""
    command = (small, "-o", tmp_path / "out", "--tokens", 1000, "--dry-run")
    plan = in_words(calibrate(*command).stdout)
    found = re.search(r"disk: ([\d.]+) MB needed, .+ free; up to ([\d.]+) MB are hidden", plan)
    assert found is not None
    whole, states = map(float, found.groups())
    assert 2 * 4 * 1000 * 256 / 1e6 < states < whole
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "layer-000.safetensors").write_bytes(bytes(1 << 20))
    found = re.search(
        r"disk: ([\d.]+) MB needed beside what is done of it", in_words(calibrate(*command).stdout)
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(whole - (1 << 20) / 1e6, abs=0.1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def last_frame(steps: list[tuple[float, int]], *, total: int, n_layers: int) -> str:
    """What the bar says after the steps: at so many seconds, so much done of the total."""
    clock, shown = Clock(), io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, get_time=clock)
    with _bars(console, n_layers) as (on_progress, _):
        for clock.now_s, done in steps:
            on_progress(done, total)
    return in_words(shown.getvalue())


def test_the_bar_shows_layer_speed_and_time_left() -> None:
    """Catches no time left where a batch takes minutes, and a speed through one layer alone."""
    # 64 layers of 1,000 tokens; a batch of 100 tokens takes 100 s.
    steps = [(100.0 * i, 100 * i) for i in range(1, 26)]
    shown = last_frame(steps, total=64_000, n_layers=64)
    assert "layer 3 of 64, 0.016 tokens/s, 17 hours left" in shown
    quick = last_frame([(0.0, 0), (10.0, 32_000)], total=64_000, n_layers=64)
    assert "layer 33 of 64, 50 tokens/s, 10 s left" in quick


def test_what_was_done_before_says_nothing_of_the_speed() -> None:
    """Catches a continuation at layer 60 that promises its end in a moment."""
    steps = [(10.0, 60_100), (20.0, 60_200), (30.0, 60_300)]
    shown = last_frame(steps, total=64_000, n_layers=64)
    assert "layer 61 of 64, 0.16 tokens/s, 6 minutes left" in shown


def test_sensitivities_show_their_step_and_the_time_left() -> None:
    """Catches a second bar that stays hidden."""
    clock, shown = Clock(), io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, get_time=clock)
    with _bars(console, 64) as (_, on_step):
        for clock.now_s, done in ((0.0, 1), (60.0, 2), (120.0, 3)):
            on_step(done, 129)
    assert "sensitivities, step 3 of 129, 2 hours left" in in_words(shown.getvalue())


def test_a_run_shows_its_layers(small: Path, tmp_path: Path) -> None:
    """Catches a bar that the pass does not move."""
    out = tmp_path / "out"
    run = calibrate(small, "-o", out, "--tokens", 5000)
    assert run.stdout == f"{out}\n"
    said = in_words(run.stderr)
    assert "layer 1 of 1, " in said
    assert "tokens/s" in said
    assert "1 layers in" in said


def test_the_time_is_that_of_the_device() -> None:
    """Catches a time measured on the processor and told of a device."""
    work = Estimate(1e12, 1e9, 0)
    assert estimated_seconds(work) > 0
    with pytest.raises(RuntimeError):  # torch's: this one holds no numbers
        estimated_seconds(work, "meta")


def test_the_plan_gives_a_time_on_a_device(small: Path, tmp_path: Path, device: str) -> None:
    """Catches a plan without its time."""
    run = calibrate(small, "-o", tmp_path / "out", "--dry-run", device=device)
    assert f"on {device} as it is now, and what reading" in in_words(run.stdout)
