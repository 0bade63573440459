"""A model's Markdown as HTML that holds nothing of the model's own HTML.

Tags in it stay text, pictures are links and links go to the web alone. Formulas become MathML,
which browsers draw without any help, and code is coloured and gets a button to copy it.
"""

from collections.abc import Sequence
from functools import cache
from html import escape
from typing import Any

from latex2mathml import exceptions
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import find_lexer_class_by_name, get_lexer_by_name
from pygments.util import ClassNotFound

MOST_FORMULA = 4000
"""Characters of the longest formula that is drawn; a longer one is shown as it was written."""
_NO_FORMULA: tuple[type[Exception], ...] = (
    *(e for e in vars(exceptions).values() if isinstance(e, type) and issubclass(e, Exception)),
    *(LookupError, ValueError, TypeError, AttributeError, RecursionError),
)
"""An unfinished formula ends all of these ways."""
_STAND_INS = {"<": "\ue000", ">": "\ue001", '"': "\ue002"}
"""latex2mathml hands marks in a formula's text on as they are: it gets others in their place."""
_REFUSED = ("\\href", "\\style", "\\class")
_COPY = '<button type="button" class="copy" aria-label="Copy the code">Copy</button>'


def as_html(markdown: str) -> str:
    """The HTML of a text that may be anything, and may end anywhere."""
    return str(_parser().render(markdown))


def code_css() -> str:
    """The colours of code, in light and in dark."""
    light = HtmlFormatter(style="default", nobackground=True).get_style_defs(".code")
    dark = HtmlFormatter(style="github-dark", nobackground=True).get_style_defs(".body--dark .code")
    return f"{light}\n{dark}"


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    parser.enable(["table", "strikethrough"]).disable("image")
    parser.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False)
    parser.use(texmath_plugin, delimiters="brackets")
    for name in ("math_inline", "math_block", "math_inline_double"):
        parser.add_render_rule(name, _formula)
    parser.add_render_rule("fence", _code)
    parser.add_render_rule("code_block", _code)
    parser.add_render_rule("link_open", _link)
    return parser


def _formula(_self: object, tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    is_block = token.type == "math_block"
    source = token.content.strip()
    tag, kind = ("div", "block") if is_block else ("span", "inline")
    drawn = _mathml(source, is_block=is_block) or f"<code>{escape(source)}</code>"
    return f'<{tag} class="formula {kind}">{drawn}</{tag}>'


def _mathml(source: str, *, is_block: bool) -> str | None:
    """None where it is no formula, or one that would be more than a picture."""
    if len(source) > MOST_FORMULA or any(one in source for one in _REFUSED):
        return None
    for name in ("aligned", "gathered", "split"):
        source = source.replace(f"{{{name}}}", "{align*}")
    for mark, stand_in in _STAND_INS.items():
        source = source.replace(mark, stand_in)
    try:
        drawn = convert(source, display="block" if is_block else "inline")
    except _NO_FORMULA:
        return None
    for mark, stand_in in _STAND_INS.items():
        drawn = drawn.replace(f"<mi>{stand_in}</mi>", f"<mo>{escape(mark)}</mo>")
        drawn = drawn.replace(stand_in, escape(mark))
    return drawn


def _code(_self: object, tokens: Sequence[Token], index: int, *_: Any) -> str:
    token = tokens[index]
    language = token.info.split()[0][:40] if token.info.strip() else ""
    return (
        f'<div class="code"><div class="code-head"><span>{escape(language)}</span>{_COPY}</div>'
        f'<pre tabindex="0"><code>{_coloured(token.content, language)}</code></pre></div>'
    )


def _coloured(code: str, language: str) -> str:
    try:
        find_lexer_class_by_name(language)
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return escape(code)
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True)))


def _link(_self: object, tokens: Sequence[Token], index: int, *_: Any) -> str:
    target = str(tokens[index].attrGet("href") or "")
    if not target.lower().startswith(("https://", "http://", "mailto:")):
        target = "#"
    return (
        f'<a href="{escape(target)}" title="{escape(target)}" rel="noopener noreferrer nofollow">'
    )
