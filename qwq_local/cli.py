"""The `qwq` program: ask and chat, and the commands of the other packages, looked up by name."""

import dataclasses
import json
import logging
import sys
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from typer.exceptions import TyperException

from convert.errors import QwqError, UsageError

if TYPE_CHECKING:
    from qwq_local.model import QwQ
    from qwq_local.reply import Reply
    from qwq_local.sampling import Sampling


class Elsewhere(NamedTuple):
    """A command that another package brings: `attribute` of `module` is its typer program."""

    module: str
    attribute: str
    summary: str


COMMANDS_ELSEWHERE = {
    "serve": Elsewhere(
        "qwq_local.server.cli", "app", "Serve a model to programs that speak OpenAI's interface."
    ),
    "quantize": Elsewhere(
        "quant_eval.cli",
        "quantize_app",
        "Quantize a checkpoint, check the files and show what it cost.",
    ),
    "calibrate": Elsewhere(
        "convert.calibrate_cli",
        "app",
        "Measure what a checkpoint's linears read: imatrix, Hessians.",
    ),
    "convert": Elsewhere("convert.cli", "app", "Convert a checkpoint to GGUF or GPTQ files."),
    "verify": Elsewhere("convert.verify_cli", "app", "Read a GGUF file whole and judge it."),
    "inspect": Elsewhere("convert.inspect_cli", "app", "Show what a GGUF file is made of."),
    "eval": Elsewhere("quant_eval.cli", "app", "Measure what quantizing did to a model."),
}

LOUD_LIBRARIES = ("gguf", "torchao", "torch.utils._pytree")
"""They log what they could not load and nothing here uses, or each file that they describe."""

app = typer.Typer(
    help="Quantize QwQ-32B, run it and measure it, on this machine.",
    epilog="Start with `qwq quantize`, then `qwq ask 'Which is larger, 9.9 or 9.11?'`.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        help="GGUF file, GPTQ or checkpoint folder, or a folder that holds one "
        "(default: what was quantized last under ./models).",
        show_default=False,
    ),
]
System = Annotated[str | None, typer.Option(help="System prompt.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same reply.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Longest reply, thought included (default: the context).")
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens for prompt and reply (default: by the model and the memory)."),
]
Threads = Annotated[int | None, typer.Option(help="Threads (default: by the cores and the model).")]
KvType = Annotated[
    Literal["auto", "f16", "q8_0"],
    typer.Option(help="What a GGUF file's kv_cache is stored in; q8_0 takes half."),
]
SpeculationMode = Annotated[
    Literal["off", "exact", "close"],
    typer.Option(
        "--speculation",
        help="Read proposed tokens in batches where that is faster: never, where the reply stays "
        "the same bit for bit, or within rounding.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(help="A smaller GGUF model that proposes tokens (default: from the context)."),
]
_SAMPLER = "Sampling (default: the model's own)"
Temperature = Annotated[
    float | None, typer.Option(help="0 always takes the likeliest.", rich_help_panel=_SAMPLER)
]
TopK = Annotated[int | None, typer.Option(help="0 switches it off.", rich_help_panel=_SAMPLER)]
TopP = Annotated[float | None, typer.Option(help="1 switches it off.", rich_help_panel=_SAMPLER)]
MinP = Annotated[float | None, typer.Option(help="0 switches it off.", rich_help_panel=_SAMPLER)]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="1 switches it off.", rich_help_panel=_SAMPLER)
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(help="0 to 2, against repetition.", rich_help_panel=_SAMPLER),
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Show counts, speed and llama.cpp's log.")
]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from importlib import metadata

        typer.echo(f"qwq {metadata.version('qwq-local')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
def ask(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The question. What is piped in is appended to it."),
    ] = None,
    *,
    model: Model = None,
    system: System = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    context: Context = None,
    threads: Threads = None,
    kv_type: KvType = "auto",
    speculation: SpeculationMode = "exact",
    draft: Draft = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document when the reply is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show the answer alone.")] = False,
    verbose: Verbose = False,
) -> None:
    """Ask one question; the thought goes to stderr, the answer to stdout."""
    from qwq_local.reply import collect
    from qwq_local.terminal import ProgressLine, print_reply

    text = _with_piped(prompt)
    settings: dict[str, Any] = {
        "context": context,
        "threads": threads,
        "kv_type": kv_type,
        "speculation": speculation,
        "draft": draft,
    }
    with _open(model, settings, quiet=quiet or as_json, verbose=verbose) as qwq:
        sampling = _changed(
            qwq.sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
        )
        session = qwq.session(system=system, sampling=sampling, seed=seed)
        line = ProgressLine("reading")
        events = line.before(session.send(text, max_tokens=max_tokens, on_progress=line))
        if as_json:
            typer.echo(_as_json(qwq, collect(events)))
        else:
            print_reply(
                events,
                thought="hidden" if quiet else "dimmed",
                figures=verbose,
                markdown=sys.stdout.isatty(),
            )


@app.command()
def chat(
    *,
    model: Model = None,
    system: System = None,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    kv_type: KvType = "auto",
    speculation: SpeculationMode = "exact",
    draft: Draft = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Show a thought as one line with its length and time.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Converse; Ctrl-C stops a reply, Ctrl-D leaves, /help lists the commands."""
    from qwq_local.chat import run_chat

    settings: dict[str, Any] = {
        "context": context,
        "threads": threads,
        "kv_type": kv_type,
        "speculation": speculation,
        "draft": draft,
    }
    with _open(model, settings, quiet=False, verbose=verbose) as qwq:
        sampling = _changed(
            qwq.sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
        )
        run_chat(qwq, system=system, sampling=sampling, seed=seed, folded=fold)


@app.command()
def plan(
    model: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file, a GPTQ or checkpoint folder, or a folder that holds one."
        ),
    ],
    *,
    context: Context = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what a model would take of each device's memory, without loading it."""
    from convert.files import format_nbytes
    from qwq_local.engine import EngineSettings
    from qwq_local.engines.here import plan_here
    from qwq_local.find import find_model
    from qwq_local.memory_plan import find_nvidia_gpus

    found = find_model(model)
    chosen, plans = plan_here(found.path, EngineSettings(context))
    if as_json:
        facts = [{"fits": p.fits, "chosen": p == chosen} for p in plans]
        rows = [dataclasses.asdict(p) | fact for p, fact in zip(plans, facts, strict=True)]
        typer.echo(json.dumps(rows, indent=2))
        return
    for memory in plans:
        verdict = "fits" if memory.fits else "does not fit"
        verdict += ", and is chosen" if memory == chosen else ""
        typer.echo(
            f"{memory.context:,} tokens, kv_cache in {memory.kv_type}, batches of {memory.batch}, "
            f"{memory.n_gpu_layers} layers on GPUs: {verdict}"
        )
        for share in memory.shares:
            typer.echo(
                f"  {share.device.name}: weights {format_nbytes(share.weights_nbytes)}, kv_cache "
                f"{format_nbytes(share.kv_nbytes)}, compute {format_nbytes(share.compute_nbytes)}; "
                f"{format_nbytes(share.device.free_nbytes)} are free"
            )
    if not any(share.device.is_gpu for share in chosen.shares):
        remedy = (
            "where llama-cpp-python is built without CUDA, QWQ_BACKEND=cuda make setup builds it so"
            if found.kind == "gguf"
            else "where torch is built without CUDA, install a build that has it"
        )
        for gpu in find_nvidia_gpus():
            free = format_nbytes(gpu.free_nbytes)
            typer.echo(f"  not used: {gpu.name}, {free} free; {remedy}")


def _self_generate(*arguments: Any) -> Any:
    from qwq_local.self_generate import self_generate

    return self_generate(*arguments)


def _mount(name: str, place: Elsewhere) -> None:
    """Offer a command whose package is imported when it is called, not before."""

    @app.command(
        name,
        help=place.summary,
        add_help_option=False,  # its own --help answers
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )
    def forward(context: typer.Context) -> None:
        program = getattr(import_module(place.module), place.attribute)
        code = typer.main.get_command(program).main(
            context.args,
            prog_name=context.command_path,
            standalone_mode=False,
            obj=_self_generate,  # `convert` knows no engine; calibrating may want one
        )
        if isinstance(code, int) and code != 0:
            raise typer.Exit(code)


for _name, _place in COMMANDS_ELSEWHERE.items():
    _mount(_name, _place)


def main() -> None:
    """Run the program. Exit codes: 0, 1 error, 2 usage, 3 regression found, 130 interrupted."""
    logging.getLogger("qwq_local").setLevel(logging.WARNING)
    for library in LOUD_LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        code = typer.main.get_command(app).main(prog_name="qwq", standalone_mode=False)
    except QwqError as error:
        typer.echo(f"error: {error}", err=True)
        code = error.exit_code
    except TyperException as error:
        problem = error.format_message().removesuffix(".")
        typer.echo(f"error: {problem}; --help lists what there is", err=True)
        code = error.exit_code
    sys.exit(code)


def _open(
    model: str | None,
    settings: dict[str, Any],
    *,
    quiet: bool,
    verbose: bool,
) -> "QwQ":
    from qwq_local.find import newest_model
    from qwq_local.model import QwQ
    from qwq_local.terminal import ProgressLine, note

    if verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("qwq_local").setLevel(logging.DEBUG)
    path = newest_model().path if model is None else model
    with closing(ProgressLine("loading")) as line:
        qwq = QwQ.open(path, on_progress=line, **settings)
    if not quiet and str(qwq.path) != str(Path(model or "")) and qwq.path != model:
        note(f"using {qwq.path}")
    return qwq


def _with_piped(prompt: str | None) -> str:
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text:
        raise UsageError("ask: there is no question; give one, or pipe one in")
    return text


def _changed(sampling: "Sampling", **given: Any) -> "Sampling":
    """The model's sampling with the numbers that were given on the command line."""
    return dataclasses.replace(
        sampling, **{name: value for name, value in given.items() if value is not None}
    )


def _as_json(qwq: "QwQ", reply: "Reply") -> str:
    document = {"model": str(qwq.path)} | dataclasses.asdict(reply)
    document["timings"]["tokens_per_s"] = reply.timings.tokens_per_s
    return json.dumps(document, ensure_ascii=False, indent=2)


if __name__ == "__main__":
    main()
