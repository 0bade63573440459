"""A checkpoint in; quantized, checked and measured files out: what `make quantize` runs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.calibration import (
    Conversation,
    Passage,
    load_conversations,
    load_tokenizer,
    set_digest,
)
from convert.checkpoint import Checkpoint
from convert.errors import OutputExistsError, QwqError, UsageError
from convert.files import check_disk_space, missing_nbytes
from convert.gguf_export import export_planned
from convert.gptq import GptqSettings
from convert.layer_work import passing_work
from convert.passages import built_in_passages
from convert.plan import FilePlan, plan_file
from convert.recipe import RECIPES, find_recipe
from quant_eval.environment import describe_environment
from quant_eval.kept import Kept
from quant_eval.manifest import Manifest, digest
from quant_eval.reference_store import (
    Binding,
    EvaluationTokens,
    load_reference,
    save_reference,
    unfinished_path,
    why_stale,
)
from quant_eval.results import EvaluationSettings, Report
from quant_eval.sizes import model_size
from qwq_local.memory import choose_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quant_eval.layers import LayerErrors
    from quant_eval.measurement import Measured
    from quant_eval.suite import Exam

NANO_CHECKPOINT = Path(__file__).parent / "nano" / "checkpoint"
NANO_TYPES = (
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q4_K_M",
    "Q4_K_S",
    "Q3_K_M",
    "Q2_K",
    "gptq-4bit",
)
USUAL_TYPES = ("Q4_K_M", "gptq-4bit")
GPTQ_TYPES = {"gptq-4bit": GptqSettings(bits=4)}
CALIBRATION = Path(__file__).parents[1] / "convert" / "data" / "calibration.jsonl"
DECIDING_PACKAGES = ("qwq-local", "llama-cpp-python", "torch", "transformers", "gptqmodel")
LAYER_TOKENS = 512

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Output:
    """One file or folder; kept where it is there already and was made of the same."""

    type_name: str
    path: Path
    kept: bool
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What `write` will do; files: the GGUF outputs that are to be written."""

    checkpoint: Checkpoint
    outputs: tuple[Output, ...]
    files: tuple[FilePlan, ...]


def model_name(checkpoint: Checkpoint) -> str:
    """The name for files: the checkpoint's, but the bundled one's folder says nothing."""
    return "nano-qwq" if checkpoint.path.samefile(NANO_CHECKPOINT) else checkpoint.name


def parse_types(names: Sequence[str]) -> tuple[str, ...]:
    """Types as the recipes spell them, each once, in the order given.

    Raises UsageError that lists the known ones.
    """
    known = {name.lower(): name for name in (*RECIPES, *GPTQ_TYPES)}
    for name in names:
        if name.lower() not in known:
            raise UsageError(f"type {name}: is unknown; choose from {', '.join(known.values())}")
    return tuple(dict.fromkeys(known[name.lower()] for name in names))


def make_plan(
    checkpoint: Checkpoint, types: Sequence[str], manifest: Manifest, *, force: bool
) -> Plan:
    """What there is to do in the manifest's folder; weights are read only to know them again.

    Raises OutputExistsError for an output that was made of something else, unless forced, and
    DiskFullError where the new ones have no room.
    """
    name = model_name(checkpoint)
    outputs = []
    files = []
    for type_name in types:
        path = manifest.folder / f"{name}-{type_name}{'' if type_name in GPTQ_TYPES else '.gguf'}"
        kept = path.exists() and not force
        if kept and manifest.origin_of(path) != _origin(checkpoint, type_name, manifest):
            raise OutputExistsError(
                f"{path}: exists and was made of another checkpoint or otherwise; "
                "give --force to replace it, or another folder with -o"
            )
        if kept:
            size = model_size(path)
            nbytes, bits_per_weight = size.nbytes, size.bits_per_weight
        elif type_name in GPTQ_TYPES:
            from convert.gptq_export import plan_gptq

            gptq = plan_gptq(checkpoint, GPTQ_TYPES[type_name])
            nbytes, bits_per_weight = gptq.nbytes, gptq.bits_per_weight
        else:
            file = plan_file(checkpoint, find_recipe(type_name), path)
            files.append(file)
            nbytes, bits_per_weight = file.nbytes, file.bits_per_weight
        outputs.append(Output(type_name, path, kept, nbytes, bits_per_weight))
    new = (output for output in outputs if not output.kept)
    n_needed = sum(missing_nbytes(output.path, output.nbytes) for output in new)
    check_disk_space(manifest.folder, n_needed)
    return Plan(checkpoint, tuple(outputs), tuple(files))


def write(
    plan: Plan, manifest: Manifest, *, threads: int | None, force: bool, on_progress: Progress
) -> None:
    """Write what is not there yet: all GGUF files in one pass, then each GPTQ folder."""
    checkpoint = plan.checkpoint
    new = [output for output in plan.outputs if not output.kept]
    gptq = [output for output in new if output.type_name in GPTQ_TYPES]
    if plan.files:
        title = f"writing {len(plan.files)} GGUF files in one pass, bytes of the checkpoint"
        export_planned(
            checkpoint,
            plan.files,
            threads=threads,
            force=force,
            on_progress=lambda done, total: on_progress(title, done, total),
            on_read_back=lambda done, total: on_progress("reading back, bytes", done, total),
        )
        for output in new:
            if output not in gptq:
                manifest.record(output.path, _origin(checkpoint, output.type_name, manifest))
    for output in gptq:
        _limit_torch(engine_threads(checkpoint, threads))
        _make_gptq(checkpoint, output, force=force, on_progress=on_progress)
        manifest.record(output.path, _origin(checkpoint, output.type_name, manifest))


def _make_gptq(
    checkpoint: Checkpoint, output: Output, *, force: bool, on_progress: Progress
) -> None:
    from convert.gptq_export import export_gptq

    title = f"solving {output.path.name}, linears"
    export_gptq(
        checkpoint,
        output.path,
        settings=GPTQ_TYPES[output.type_name],
        calibration=calibration_passages(checkpoint),
        force=force,
        on_progress=lambda done, total: on_progress(title, done, total),
    )


def calibration_passages(checkpoint: Checkpoint) -> Sequence[Passage]:
    """nano-qwq knows its own kinds of problem only; other models get all that is built in."""
    if model_name(checkpoint) == "nano-qwq":
        return load_conversations(CALIBRATION)
    return built_in_passages()


def _origin(checkpoint: Checkpoint, type_name: str, manifest: Manifest) -> str:
    """A hash of all that decides an output's bytes."""
    made_of: dict[str, Any] = {
        "checkpoint": manifest.checkpoint_sha256(checkpoint.path),
        "name": model_name(checkpoint),
        "type": type_name,
    }
    if type_name in GPTQ_TYPES:
        made_of["settings"] = dataclasses.asdict(GPTQ_TYPES[type_name])
        made_of["calibration"] = set_digest(calibration_passages(checkpoint))
    return digest(made_of)


def check(
    outputs: Sequence[Output], manifest: Manifest, *, threads: int | None, on_progress: Progress
) -> None:
    """Load each output that was not checked yet and let it speak; raises QwqError on the first."""
    from quant_eval.suite import CHECK_CONTEXT, check_model
    from qwq_local import QwQ

    unchecked = [output.path for output in outputs if not manifest.is_checked(output.path)]
    for index, path in enumerate(unchecked):
        with QwQ.open(path, context=CHECK_CONTEXT, threads=threads, isolated=path.is_file()) as qwq:
            check_model(qwq)
        manifest.record_check(path)
        on_progress("checking, files", index + 1, len(unchecked))


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be measured, and against which reference.

    text: JSON Lines to score, the built-in ones by default. states: the folder of a reference that
    was made before; None keeps one in the manifest's folder. tasks: files of benchmarks.
    """

    settings: EvaluationSettings
    text: Path | None = None
    states: Path | None = None
    tasks: tuple[Path, ...] = ()


def text_alone(ask: Ask) -> Ask:
    """The same without a task: what is asked of the file whose numbers are the path's noise."""
    return replace(ask, settings=replace(ask.settings, n_problems=0, needles=()), tasks=())


@dataclass(frozen=True, slots=True)
class Server:
    """The address of an OpenAI-compatible server, and how many replies it is asked for at once."""

    url: str
    at_once: int


def measure(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    manifest: Manifest,
    ask: Ask,
    *,
    threads: int,
    on_progress: Progress,
) -> tuple[list["Measured"], list[QwqError]]:
    """Measure each file against the checkpoint; parts that are known are not measured again.

    Returns what could be measured, and the error of each file that could not.
    Raises QwqError for a path that is none, and for a stale reference.
    """
    from quant_eval.measurement import measure_file

    for path in paths:
        if not path.exists():
            raise QwqError(f"{path}: no such file or folder; check the path")
    exam = prepare(checkpoint, manifest, ask, threads=threads, on_progress=on_progress)
    measured: list[Measured] = []
    failures: list[QwqError] = []
    for path in paths:
        sha256 = manifest.sha256_of(path)
        kept = Kept(manifest.folder / "results" / f"{sha256[:16]}.jsonl")
        try:
            measured.append(
                measure_file(
                    path, exam, kept, sha256=sha256, threads=threads, on_progress=on_progress
                )
            )
        except QwqError as error:
            failures.append(error)
    return measured, failures


def prepare(
    checkpoint: Checkpoint,
    manifest: Manifest,
    ask: Ask,
    *,
    threads: int,
    on_progress: Progress,
) -> "Exam":
    """The exam, with the reference that is kept where it is still the right one."""
    from quant_eval import suite

    count = _counter(checkpoint)
    problems = suite.choose_problems(ask.settings, ask.tasks, count)  # errors before hours of work
    binding = bind(checkpoint, manifest, ask.text, ask.settings.n_tokens)
    folder = ask.states or manifest.folder / "reference"
    if ask.states is None:
        keep_reference(
            checkpoint, folder, binding, ask.text, threads=threads, on_progress=on_progress
        )
    tokens, reference = load_reference(folder, checkpoint, binding)
    return suite.Exam(
        tokens,
        reference,
        problems,
        ask.settings,
        _conditions(binding.checkpoint_sha256),
        suite.longest_prompt(problems, count),
    )


def _counter(checkpoint: Checkpoint) -> Callable[[str], int]:
    """Counts tokens; the tokenizer is loaded when it is first asked."""

    @cache
    def tokenizer() -> "PreTrainedTokenizerBase":
        return load_tokenizer(checkpoint.path)

    return lambda text: len(tokenizer().encode(text, add_special_tokens=False))


def measure_servers(
    servers: Sequence[Server],
    manifest: Manifest,
    ask: Ask,
    *,
    checkpoint: Checkpoint | None = None,
    on_progress: Progress,
) -> tuple[list["Measured"], list[QwqError]]:
    """Ask servers the problems alone, as `measure` does files.

    checkpoint: of the files that they are held against, whose tokenizer counts for needles.
    """
    from quant_eval import suite
    from quant_eval.measurement import measure_server

    count = suite.rough_count if checkpoint is None else _counter(checkpoint)
    problems = suite.choose_problems(ask.settings, ask.tasks, count)
    nothing = EvaluationTokens((), (), "")
    exam = suite.Exam(nothing, None, problems, ask.settings, digest("server"))
    measured: list[Measured] = []
    failures: list[QwqError] = []
    for server in servers:
        kept = Kept(manifest.folder / "results" / f"{digest(server.url)[:16]}.jsonl")
        try:
            measured.append(
                measure_server(
                    server.url, exam, kept, at_once=server.at_once, on_progress=on_progress
                )
            )
        except QwqError as error:
            failures.append(error)
    return measured, failures


def _conditions(checkpoint_sha256: str) -> str:
    """A digest of what all numbers depend on beside the file, the text and the settings."""
    packages = {name: describe_environment().get(name) for name in DECIDING_PACKAGES}
    return digest({"checkpoint": checkpoint_sha256, "packages": packages})


def errors_by_layer(
    checkpoint: Checkpoint,
    path: Path,
    manifest: Manifest,
    ask: Ask,
    *,
    n_tokens: int = LAYER_TOKENS,
    threads: int,
    on_progress: Progress | None,
) -> "LayerErrors | None":
    """Where a file's error comes from, on the first passages that hold n_tokens reply tokens.

    on_progress: None measures nothing, and returns None where nothing is kept.
    Raises QwqError where the file cannot be read or was not made from the checkpoint.
    """
    from quant_eval import suite
    from quant_eval.layers import LayerErrors, layer_errors
    from quant_eval.results import to_json

    binding = bind(checkpoint, manifest, ask.text, n_tokens)
    sha256 = manifest.sha256_of(path)
    kept = Kept(manifest.folder / "results" / f"{sha256[:16]}.jsonl")
    conditions = _conditions(binding.checkpoint_sha256)
    key = digest([conditions, sha256, "layers", binding.evaluation_sha256, n_tokens])
    data = kept.get(key)
    if data is not None:
        return LayerErrors.from_json(data)
    if on_progress is None:
        return None
    _limit_torch(threads)
    conversations, _ = evaluation_text(checkpoint, ask.text)
    tokens = suite.tokenize_text(checkpoint, conversations, n_tokens)
    title = f"{path.name}: error by layer, layers"
    errors = layer_errors(
        path,
        checkpoint,
        [passage.ids for passage in tokens.passages],
        on_progress=partial(on_progress, title),
    )
    kept.put(key, to_json(errors))
    return errors


def bind(checkpoint: Checkpoint, manifest: Manifest, text: Path | None, n_tokens: int) -> Binding:
    """What a reference for this checkpoint and text must be of."""
    _, evaluation_sha256 = evaluation_text(checkpoint, text)
    return Binding(manifest.model_sha256(checkpoint.path), evaluation_sha256, n_tokens)


def evaluation_text(checkpoint: Checkpoint, path: Path | None) -> tuple[list[Conversation], str]:
    """What is scored, and its digest: nano-qwq knows its own kinds of problem only."""
    from quant_eval.suite import read_evaluation_text

    return read_evaluation_text(path, general=model_name(checkpoint) != "nano-qwq")


def keep_reference(
    checkpoint: Checkpoint,
    folder: Path,
    binding: Binding,
    text: Path | None,
    *,
    threads: int,
    on_progress: Progress,
    calibration: Path | None = None,
) -> None:
    """Make the reference in the folder, unless the right one is there, whole.

    Interrupted, the same call continues with the first layer that is not finished. calibration: a
    folder of `qwq calibrate --evaluation`, which saves the run of the model.
    """
    from quant_eval import suite
    from quant_eval.reference import BATCH_TOKENS, kept_hidden_states

    if not why_stale(folder, binding):
        return
    _limit_torch(threads)
    conversations, _ = evaluation_text(checkpoint, text)
    tokens = suite.tokenize_text(checkpoint, conversations, binding.n_tokens)
    ids = [passage.ids for passage in tokens.passages]
    if calibration is not None:
        save_reference(folder, tokens, kept_hidden_states(checkpoint, ids, calibration), binding)
        return
    made_of = {
        "checkpoint": binding.checkpoint_sha256,
        "passages": digest(ids),
        "batch_tokens": BATCH_TOKENS,
    }
    with passing_work(unfinished_path(folder), made_of) as work:
        reference = suite.make_reference(checkpoint, tokens, work, on_progress=on_progress)
        save_reference(folder, tokens, reference, binding)


def make_report(
    checkpoint: Checkpoint | None,
    manifest: Manifest,
    ask: Ask,
    measured: "Sequence[Measured]",
    layers: "Mapping[str, LayerErrors | None] | None" = None,
) -> Report:
    """The rows of all measured files, with where and on what they were measured."""
    from quant_eval.measurement import file_result, find_floor

    floor = find_floor(measured)
    return Report(
        model=measured[0].name if checkpoint is None else model_name(checkpoint),
        checkpoint_sha256=None if checkpoint is None else manifest.model_sha256(checkpoint.path),
        evaluation_sha256=None if checkpoint is None else evaluation_text(checkpoint, ask.text)[1],
        settings=ask.settings,
        environment=describe_environment(),
        files=tuple(file_result(one, floor, (layers or {}).get(one.name)) for one in measured),
    )


def engine_threads(checkpoint: Checkpoint, threads: int | None) -> int:
    """Threads for engines, the solver and the reference: the caller's number, or what fits."""
    return choose_threads(threads, n_weights=n_weights(checkpoint))


def _limit_torch(threads: int) -> None:
    """Set torch's threads for the whole process."""
    import torch

    torch.set_num_threads(threads)


def n_weights(checkpoint: Checkpoint) -> int:
    """Weights of the model, embeddings included."""
    return sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def is_small(checkpoint: Checkpoint) -> bool:
    """Whether everything is measured unasked, since it takes seconds."""
    from quant_eval.suite import LARGE_MODEL_WEIGHTS

    return n_weights(checkpoint) < LARGE_MODEL_WEIGHTS
