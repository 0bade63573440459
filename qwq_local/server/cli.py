"""`qwq serve`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from qwq_local.server.serving import Listening, serve

if TYPE_CHECKING:
    from qwq_local.rope import RopeMode

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_ACCESS = "Access"


@app.command()
def command(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="GGUF file, GPTQ or checkpoint folder, or a folder that holds one "
            "(default: what was quantized last under ./models).",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens for prompt and reply (default: by the model and the memory)."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads (default: by the cores and the model).")
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(
            min=1, help="Replies that are made at once, in one batch; --context is for each."
        ),
    ] = 1,
    rope: Annotated[
        str,
        typer.Option(help="auto, native or yarn; auto switches only where one reply is made."),
    ] = "auto",
    engine: Annotated[
        Literal["own", "vllm"],
        typer.Option(help="vllm starts vLLM on a GPTQ folder or a checkpoint instead."),
    ] = "own",
    gpus: Annotated[
        int | None,
        typer.Option(help="For vllm: GPUs of a host that share the model (default: all it can)."),
    ] = None,
    hosts: Annotated[
        int, typer.Option(min=1, help="For vllm: machines, joined by Ray, that share it.")
    ] = 1,
    reasoning: Annotated[
        str,
        typer.Option(help="Where thoughts go: separate, or inline as <think> in the content."),
    ] = "separate",
    reasoning_field: Annotated[
        str,
        typer.Option(help="reasoning_content, or both: in the field `reasoning` as well."),
    ] = "reasoning_content",
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait at most.")] = 32,
    page: Annotated[
        bool, typer.Option(help="The chat page under /, where the extra [web] is installed.")
    ] = True,
    require_key: Annotated[
        bool,
        typer.Option(
            "--require-key",
            help="Ask for the key on this machine too. It is $QWQ_API_KEY, or is made once.",
            rich_help_panel=_ACCESS,
        ),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name that the server goes by.", rich_help_panel=_ACCESS),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A page from elsewhere that may use it, as in https://app.example.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate, PEM.", rich_help_panel=_ACCESS)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="Its private key, PEM.", rich_help_panel=_ACCESS)
    ] = None,
) -> None:
    """Serve the model to programs that speak OpenAI's interface; Ctrl-C ends it."""
    from qwq_local import QwQ, UsageError
    from qwq_local.find import find_model, newest_model
    from qwq_local.server.app import ServerSettings
    from qwq_local.server.chat_wire import reasoning_form
    from qwq_local.server.guard import LOOPBACK, Access
    from qwq_local.server.keys import find_key, key_file
    from qwq_local.server.page.mount import has_page
    from qwq_local.server.page.shelf import conversations_folder

    if (tls_cert is None) != (tls_key is None):
        raise UsageError("serve: --tls-cert and --tls-key go together; give both")
    tls = None if tls_cert is None or tls_key is None else (tls_cert, tls_key)
    listening = Listening(host, port, tls)
    path = (newest_model() if model is None else find_model(Path(model))).path
    key = None
    if require_key or "QWQ_API_KEY" in os.environ or not listening.is_loopback:
        file = key_file(os.environ)
        key, is_new = find_key(file, os.environ)
        if is_new:
            typer.echo(f"key, shown this once and kept in {file}: {key}", err=True)
    if engine == "vllm":
        from qwq_local.vllm import VllmSettings, run_vllm

        vllm = VllmSettings(
            host,
            port,
            context,
            cast("RopeMode", rope),
            gpus,
            hosts,
            None if parallel == 1 else parallel,
            tls,
        )
        run_vllm(path, vllm, key=key, environment=os.environ)
    access = Access(
        frozenset({*LOOPBACK, listening.host, *(allow_host or ())}),
        frozenset(allow_origin or ()),
        any_address=not listening.is_loopback,
        key=key,
    )
    folder = conversations_folder(os.environ) if page and has_page() else None
    form = reasoning_form(reasoning, reasoning_field)
    settings = ServerSettings(path.stem, access, form, folder)
    serve(
        lambda: QwQ.open(
            path, context=context, threads=threads, rope=cast("RopeMode", rope), parallel=parallel
        ),
        settings,
        listening,
        n_waiting=queue,
        n_parallel=parallel,
        on_listening=lambda address: typer.echo(
            f"serving {path.name} at {address}/v1"
            f"{f', chat page at {address}' if folder else ''}; Ctrl-C ends it",
            err=True,
        ),
    )
