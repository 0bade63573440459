"""The bars of `qwq eval`, by a clock of the test's own."""

import io

from rich.console import Console

from quant_eval.terminal import progress


def test_the_time_left_is_shown_however_long_a_step_takes() -> None:
    """Catches a bar that says nothing for hours, since a layer takes longer than it looks back."""
    times_s = [0.0]
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, get_time=lambda: times_s[-1])
    with progress(console) as on_progress:
        for seconds, done in ((0.0, 61), (300.0, 62), (600.0, 63)):
            times_s.append(seconds)
            on_progress("reference, layers", done, 64)
    assert "0:05:00" in shown.getvalue()
