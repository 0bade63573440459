"""`qwq convert`: a checkpoint in, GGUF files or a GPTQ folder out."""

import typer

from convert.gguf_cli import gguf_command
from convert.gptq_cli import gptq_command

app = typer.Typer(
    help="Convert a Qwen2 checkpoint (QwQ-32B, Qwen2.5) to quantized files.",
    epilog="Start with `qwq convert gguf CHECKPOINT --dry-run`: it shows sizes and writes nothing.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


app.command(
    "gguf", epilog="Example: qwq convert gguf models/QwQ-32B --type Q4_K_M --type Q8_0 -o out"
)(gguf_command)
app.command("gptq", epilog="Example: qwq convert gptq models/QwQ-32B -o models/QwQ-32B-gptq-4bit")(
    gptq_command
)
