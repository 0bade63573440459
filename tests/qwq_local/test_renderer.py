"""Hostile templates: stopped, with an error, and the next one renders."""

from pathlib import Path

import pytest

from convert.errors import QwqError
from qwq_local import child, renderer
from tests.qwq_local.ctrl_c import interrupted, use_narrow_pipes

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='x') %}{% for _ in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
LAUGHS = (
    "{% set n = namespace(x=[1]) %}{% for _ in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x | tojson }}"
)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "RENDER_SECONDS", 1.0)


@pytest.mark.parametrize("source", [LOOP, DOUBLING, LAUGHS, "{{ 10 ** (10 ** 10) }}"])
def test_one_that_does_not_end_is_stopped(source: str) -> None:
    """Would catch an application that hangs, or is killed, by a model file."""
    with pytest.raises(QwqError, match=r"^chat template: (it ran for more than|it fails) .*; "):
        renderer.render(source, {})
    assert renderer.render("{{ a }}", {"a": "é\ud800"}) == "é\ud800"


@pytest.mark.parametrize("source", ["{{ 'x' * n }}", "{{ 'x'.center(n) }}"])
def test_output_is_bounded(source: str) -> None:
    with pytest.raises(QwqError, match="20,000,000 characters, of which 16,777,216 are allowed"):
        renderer.render(source, {"n": 20_000_000})


@pytest.mark.parametrize("source", ["{{ 'x' * n }}", "{{ 'x'.center(n) }}"])
def test_memory_is_bounded(source: str) -> None:
    with pytest.raises(QwqError, match=r"MemoryError|was stopped"):
        renderer.render(source, {"n": 10**11})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch PATH') }}",
        "{{ lipsum.__globals__['os'].popen('touch PATH').read() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/hostname' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_one_that_would_do_more_than_render_is_refused(source: str, tmp_path: Path) -> None:
    """Would catch a sandbox that was left out."""
    path = tmp_path / "made"
    with pytest.raises(QwqError, match=r"^chat template: it fails on these messages \(.*; "):
        renderer.render(source.replace("PATH", str(path)), {"messages": []})
    assert not path.exists()


def test_ctrl_c_at_any_moment_leaves_no_prompt_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Would catch a question that is answered again, since its prompt came late."""
    use_narrow_pipes(monkeypatch, 8)
    renderer._renderer.cache_clear()
    assert renderer.render("{{ a }}", {"a": 0}) == "0"
    process = renderer._renderer()._child
    n_moments = 0
    while interrupted(
        lambda: renderer.render("{{ a }}", {"a": "late"}), n_moments, child, renderer
    ):
        n_moments += 1
        assert renderer.render("{{ a }}", {"a": n_moments}) == str(n_moments)
    assert n_moments > 20
    assert renderer._renderer()._child is process
    renderer._renderer.cache_clear()
