"""The dialog in which sampling, budget and context are set."""

from collections.abc import Callable

from nicegui import ui

from convert.errors import QwqError
from qwq_local.server.page.shelf import Settings

_NUMBERS = {
    "temperature": ("Temperature", "the model's own; 0 takes the likeliest", 0.05),
    "top_p": ("top_p", "the model's own", 0.05),
    "top_k": ("top_k", "the model's own; 0 is off", 1),
    "min_p": ("min_p", "the model's own", 0.01),
    "presence_penalty": ("Presence penalty", "the model's own", 0.1),
    "reasoning_tokens": ("Thought, tokens at most", "no limit; 0 answers at once", 256),
    "max_tokens": ("Reply, tokens at most", "no limit but the context", 256),
    "context": ("Context, tokens", "all that the model was loaded with", 1024),
}
_WHOLE = ("top_k", "reasoning_tokens", "max_tokens", "context")


def settings_dialog(settings: Settings, save: Callable[[Settings], None]) -> None:
    """Let a conversation's settings be changed; save is called with what was chosen."""
    with ui.dialog(value=True) as dialog, ui.card().classes("settings"):
        dialog.props('aria-label="Settings"').on("hide", dialog.delete)
        ui.label("Settings of this conversation").classes("name")
        system = ui.textarea("System prompt", value=settings.system).props("autogrow outlined")
        with ui.element("div").classes("numbers"):
            boxes = {
                name: ui.number(
                    label, value=getattr(settings, name), step=step, placeholder=hint
                ).props("outlined dense stack-label clearable")
                for name, (label, hint, step) in _NUMBERS.items()
            }
        tools = ui.textarea("Tools, a JSON list of functions in OpenAI's form")
        tools.props("autogrow outlined").set_value(settings.tools)
        problem = ui.label().classes("problem").props("role=alert")

        def take() -> None:
            numbers = {name: box.value for name, box in boxes.items()}
            numbers |= {n: int(v) for n in _WHOLE if (v := numbers[n]) is not None}
            try:
                chosen = Settings(system=system.value or "", tools=tools.value or "", **numbers)
                save(chosen)
            except QwqError as error:
                problem.set_text(str(error))
            else:
                dialog.close()

        with ui.row().classes("actions"):
            ui.button("Save", on_click=take).props("unelevated no-caps")
            ui.button("Cancel", on_click=dialog.close).props("flat no-caps")
