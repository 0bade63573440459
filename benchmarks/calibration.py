"""What calibrating buys: time, memory and quality of what is made with it, side by side.

`make bench-calibrate` calibrates a checkpoint (nano-qwq by default) with its Hessians and
sensitivities. Then it makes GGUF files of each type: by llama_model_quantize with the imatrix; by
ours, which has to give the same bytes; with GPTQ rounding; and of the same size with the types that
cost least. And GPTQ folders in two orders of columns or with other settings (`--gptq`), and
GPTQModel's, plain and with its own search of scales, of the same bits and calibration tokens.
Quality is the KL of the weights as stored, computed in float32 on the replies of 1,050 held-out
conversations of nano-qwq, of another checkpoint on those of the evaluation set, or of any texts
(`--evaluation`); its error and that of the difference to the base, the first line of its kind, are
clustered by conversation. With `--draws 12` everything is made from twelve calibration texts, and
errors are clustered by text too: of one text alone, luck with ten tokens can decide the mean. Last
comes how the memory of both GPTQ quantizers grows with a model.
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quantizers import (
    REASONING,
    WORK,
    compare_memory,
    export_gptq,
    gptqmodel,
    llama_cpp,
    qwq,
)
from convert.calibration import load_tokenizer, token_batches, tokenize_passage
from convert.checkpoint import Checkpoint
from convert.decode import decode_rows
from convert.errors import QwqError
from convert.files import replacing_file
from convert.gguf_header import GgufHeader, read_header
from convert.gptq import GptqSettings
from convert.gptq_folder import open_gptq
from convert.layer_stream import threads_for
from convert.memory import share_out
from convert.passages import BATCH_TOKENS
from convert.qwen2 import tensor_specs
from quant_eval.nano.corpus import calibration_lines, held_out_lines
from quant_eval.suite import read_evaluation_text
from tests.oracles.llama_quantizer import stored_tensors
from tests.processes import Cost

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "quant_eval" / "nano" / "checkpoint"
PARTS = ("gguf", "gptq", "gptqmodel", "memory")
TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
GPTQ_TOKENS = 16_384
HELD_OUT_PER_KIND, HELD_OUT_SEED = 150, 1  # the shipped evaluation text is of another seed
N_DRAWN = 400  # conversations of a drawn calibration text, of which GPTQ_TOKENS are taken
GPTQMODEL_MSE = 2.4  # the exponent that its own examples search scales with
ORDER = {"order": "columns"}
HELD_OUT = "nano-qwq"  # names its held-out conversations where a file of texts is asked for

Weights = Mapping[str, torch.Tensor]
Settings = Mapping[str, object]
Floats = npt.NDArray[np.float64]


class Judge:
    """KL of changed weights against the checkpoint's, in float32, a batch of passages at a time."""

    def __init__(self, source: Path, text: Path | None, n_passages: int | None) -> None:
        from transformers import Qwen2ForCausalLM

        tokenizer = load_tokenizer(source)
        conversations = read_evaluation_text(text)[0][:n_passages]
        passages = [tokenize_passage(one, tokenizer) for one in conversations]
        self._passages = sorted(passages, key=lambda one: len(one.ids))
        self.n_tokens = np.array([one.stop - one.n_prompt for one in self._passages])
        ids = [one.ids for one in self._passages]
        self._batches = token_batches(ids, batch_tokens=BATCH_TOKENS)  # in the same order
        self._model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
        self._original = {name: value.clone() for name, value in self._model.state_dict().items()}
        with torch.inference_mode():
            self._reference = list(self._logprobs())

    def divergences(self, weights: Weights) -> Floats:
        """KL(checkpoint || weights) in nats, summed over the reply of each passage."""
        self._model.load_state_dict({**self._original, **weights})
        divergences = []
        with torch.inference_mode():
            for found, expected in zip(self._logprobs(), self._reference, strict=True):
                divergences.append(float((expected.exp() * (expected - found)).sum()))
        return np.array(divergences)

    def _logprobs(self) -> Iterator[torch.Tensor]:
        """Of every passage's reply: (n_tokens, vocab_size) float64."""
        passages = iter(self._passages)
        for batch in self._batches:
            for logits, passage in zip(self._model(batch.ids).logits, passages, strict=False):
                yield logits[passage.n_prompt - 1 : passage.stop - 1].double().log_softmax(dim=-1)


def clustered(sums: Floats, n_tokens: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Mean of a token and its standard error.

    sums: (n_draws, n_passages). n_tokens: (n_passages,). All tokens of a passage are drawn
    together, in every draw of the calibration text, and so are all of a draw.
    Source: Cameron, Gelbach and Miller 2011, "Robust Inference With Multiway Clustering".
    """
    n_draws, n = len(sums), len(sums) * int(n_tokens.sum())
    mean = float(sums.sum()) / n
    off = sums - mean * n_tokens
    variance = np.square(off.sum(axis=0)).sum()
    if n_draws > 1:
        by_draw = np.square(off.sum(axis=1)).sum() * n_draws / (n_draws - 1)
        variance += max(0.0, by_draw - np.square(off).sum())
    return mean, float(np.sqrt(variance)) / n


def gguf_weights(path: Path, source: Path) -> Weights:
    header = read_header(path)
    with Checkpoint.open(source) as checkpoint, path.open("rb") as file:
        weights = {}
        for spec in tensor_specs(checkpoint.model):
            tensor = header.tensors[spec.gguf_name]
            file.seek(tensor.offset)
            blocks = np.frombuffer(file.read(tensor.nbytes), dtype=np.uint8)
            n_rows = int(np.prod(spec.shape[:-1], dtype=np.int64))
            rows = decode_rows(blocks.reshape(n_rows, -1), tensor.quant_type, spec.shape[-1])
            weights[spec.name] = torch.from_numpy(rows.reshape(spec.shape))
    return weights


def gptq_weights(path: Path) -> Weights:
    folder = open_gptq(path)
    return {name: torch.from_numpy(folder.weight(name)) for name in folder.linears}


Made = tuple[Weights, Cost]


class Table:
    """Lines in Markdown, as they come; costs are the mean of all draws.

    judges: by the name of the text that each scores, which heads its columns if there are several.
    """

    def __init__(self, judges: Mapping[str, Judge]) -> None:
        self._judges = judges
        self._bases: dict[str, Floats] = {}
        heads = ["made"]
        for name in judges:
            where = f"{name}: " if len(judges) > 1 else ""
            heads += [f"{where}KL, nats", "of the base's"]
        heads += ["processor time, s", "peak memory, MiB"]
        print(f"| {' | '.join(heads)} |")
        print("|---" * len(heads) + "|", flush=True)

    def line(self, title: str, drawn: Iterable[Made], *, is_base: bool = False) -> None:
        """drawn: made from one calibration text after the other."""
        found: dict[str, list[Floats]] = {name: [] for name in self._judges}
        costs = []
        for weights, cost in drawn:
            for name, judge in self._judges.items():
                found[name].append(judge.divergences(weights))
            costs.append(cost)
        cells = []
        for name, judge in self._judges.items():
            sums = np.stack(found[name])
            mean, error = clustered(sums, judge.n_tokens)
            cells.append(f"{mean:.5f} ± {error:.5f}")
            if is_base:
                self._bases[name] = sums
                cells.append("the base")
            else:
                cells.append(self._share(name, sums))
        self._print(title, cells, costs)

    def _share(self, name: str, sums: Floats) -> str:
        if name not in self._bases:
            return ""
        n_tokens = self._judges[name].n_tokens
        base = clustered(self._bases[name], n_tokens)[0]
        gain, error = clustered(sums - self._bases[name], n_tokens)
        return f"{1 + gain / base:.2f} ± {error / base:.2f}"

    def cost(self, title: str, costs: Sequence[Cost], quality: str = "") -> None:
        """What was made without a divergence of its own."""
        self._print(title, [quality, *[""] * (2 * len(self._judges) - 1)], costs)

    @staticmethod
    def _print(title: str, cells: Sequence[str], costs: Sequence[Cost]) -> None:
        cpu_s = np.mean([cost.cpu_s for cost in costs])
        peak = np.mean([cost.peak_nbytes for cost in costs]) / 2**20
        print(f"| {title} | {' | '.join(cells)} | {cpu_s:.0f} | {peak:.0f} |", flush=True)


def held_out_text(n_per_kind: int) -> Path:
    """More of nano-qwq's conversations than are shipped, of which a few tokens decide a type."""
    lines = partial(held_out_lines, n_per_kind, seed=HELD_OUT_SEED)
    return written(WORK / f"held-out-{n_per_kind}-{HELD_OUT_SEED}.jsonl", lines)


def evaluation_texts(
    asked: Sequence[Path] | None, *, n_per_kind: int, is_nano: bool
) -> Iterator[tuple[str, Path | None]]:
    """Names and files of the texts to score; no file: the built-in text."""
    if not asked:
        yield (HELD_OUT, held_out_text(n_per_kind)) if is_nano else ("built-in", None)
    for path in asked or ():
        if path == Path(HELD_OUT):
            yield HELD_OUT, held_out_text(n_per_kind)
        else:
            yield path.stem, path


def calibration_texts(text: Path, n_draws: int, *, is_nano: bool) -> list[Path]:
    """The text itself, and as many others as make n_draws.

    nano-qwq's are made anew of its training side, others are the same passages in another order.
    """
    texts = [text]
    for seed in range(1, n_draws):
        if is_nano:
            lines = partial(calibration_lines, N_DRAWN, seed=f"calibration {seed}")
        else:
            lines = partial(shuffled_lines, text, seed=seed)
        texts.append(written(WORK / f"drawn-{text.stem}-{seed}.jsonl", lines))
    return texts


def shuffled_lines(text: Path, *, seed: int) -> list[str]:
    lines = text.read_text(encoding="utf-8").splitlines()
    return random.Random(seed).sample(lines, len(lines))


def written(path: Path, lines: Callable[[], list[str]]) -> Path:
    with replacing_file(path, force=True) as file:
        file.write("".join(f"{line}\n" for line in lines()).encode())
    return path


def calibrate(source: Path, texts: Sequence[Path], table: Table) -> list[Path]:
    options = ("--hessians", "--sensitivities", "--device", "cpu")
    made = [WORK / f"statistics-{draw}" for draw in range(len(texts))]
    costs = [
        qwq(out, "calibrate", source, "--text", text, *options)
        for out, text in zip(made, texts, strict=True)
    ]
    table.cost("imatrix, Hessians and sensitivities", costs)
    return made


def compare_gguf(types: Sequence[str], source: Path, texts: Sequence[Path], table: Table) -> None:
    calibrations = calibrate(source, texts, table)
    unquantized = WORK / "BF16.gguf"
    qwq(unquantized, "convert", "gguf", source, "--type", "BF16")

    def llama_cpp_made(name: str) -> Iterator[Made]:
        for calibration in calibrations:
            out = calibration / f"{name}-llama.cpp.gguf"
            cost = llama_cpp(out, unquantized, name, calibration / "imatrix.gguf")
            yield gguf_weights(out, source), cost

    def made(out: Path, calibration: Path, options: Sequence[str]) -> Cost:
        given = ("--calibration", calibration, "--threads", "1")
        return qwq(out, "convert", "gguf", source, *options, *given)

    def ours(options: Sequence[str]) -> Iterator[Made]:
        for calibration in calibrations:
            cost = made(out := WORK / "ours.gguf", calibration, options)
            yield gguf_weights(out, source), cost

    for name in types:
        title = f"{name}, imatrix, llama_model_quantize"
        table.line(title, llama_cpp_made(name), is_base=True)
        theirs = calibrations[0] / f"{name}-llama.cpp.gguf"
        cost = made(out := WORK / "ours.gguf", calibrations[0], ("--type", name))
        if stored_tensors(out) != stored_tensors(theirs):
            raise QwqError(f"{out}: differs from what llama_model_quantize made, {theirs}")
        table.cost(f"{name}, imatrix, ours", [cost], "the same bytes")
        stock = fit_options(source, read_header(theirs))
        for title, options in (
            (f"{name}, GPTQ rounding", ("--type", name, "--rounding", "gptq")),
            ("its size, types that cost least", stock),
            ("its size, types that cost least, GPTQ rounding", (*stock, "--rounding", "gptq")),
        ):
            table.line(title, ours(options))


def fit_options(source: Path, stock: GgufHeader) -> tuple[str, ...]:
    """Options that leave as much for weights as a stock file's tensors take."""
    nbytes = sum(tensor.nbytes for tensor in stock.tensors.values())
    with Checkpoint.open(source) as checkpoint:
        beside = share_out(checkpoint.model, 0, context=1, kv_type="f16", margin_nbytes=1000)
    size = f"{(nbytes - beside.weights) / 1000:.3f}KB"
    return ("--fit", size, "--context", "1", "--margin", "1KB")


def gptq_settings(text: str) -> Settings:
    """Settings as an argument gives them, checked before anything is made."""
    try:
        found = json.loads(text)
        dataclasses.replace(GptqSettings(), **found)
    except (ValueError, TypeError, QwqError) as error:
        hint = f"{error}; give JSON such as {json.dumps(ORDER)}"
        raise argparse.ArgumentTypeError(hint) from error
    return dict(found)


def compare_gptq(
    others: Sequence[Settings], source: Path, texts: Sequence[Path], table: Table
) -> None:
    """others: settings that differ from those that ship, which are the base."""

    def made(settings: Settings) -> Iterator[Made]:
        out = WORK / "gptq"
        for text in texts:
            cost = export_gptq(out, source, text, n_tokens=GPTQ_TOKENS, settings=settings)
            yield gptq_weights(out), cost

    table.line("GPTQ 4 bit", made({}), is_base=True)
    for settings in others:
        told = ", ".join(f"{name} {value}" for name, value in settings.items())
        table.line(f"GPTQ 4 bit, {told}", made(settings))


def compare_gptqmodel(source: Path, texts: Sequence[Path], table: Table) -> None:
    def made(mse: float) -> Iterator[Made]:
        out = WORK / f"gptqmodel-{mse}"
        for text in texts:
            cost = gptqmodel(out, source, text, n_tokens=GPTQ_TOKENS, mse=mse)
            yield gptq_weights(out), cost

    for mse in (0.0, GPTQMODEL_MSE):
        title = f"GPTQModel 4 bit, {f'its search, {mse}' if mse else 'as it comes'}"
        table.line(title, made(mse))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=NANO)
    parser.add_argument("--text", type=Path, default=REASONING, help="to calibrate on")
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        help=f"text to score, of several each by itself; {HELD_OUT}: conversations held out of its "
        "training (default: these for nano-qwq, else the built-in text)",
    )
    parser.add_argument(
        "--per-kind",
        type=int,
        default=HELD_OUT_PER_KIND,
        help="held-out conversations of each of seven kinds (default: %(default)s)",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="of the comparisons")
    parser.add_argument(
        "--gptq",
        type=gptq_settings,
        action="append",
        help=f"settings of GPTQ that are not the default ones (default: {json.dumps(ORDER)})",
    )
    parser.add_argument("--type", choices=TYPES, action="append", help="of the GGUF files")
    parser.add_argument("--passages", type=int, help="of the evaluation set (default: all)")
    parser.add_argument(
        "--draws", type=int, default=1, help="calibration texts (default: %(default)s)"
    )
    arguments = parser.parse_args()
    source = arguments.checkpoint.absolute()
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only or PARTS
    if set(chosen) - {"memory"}:
        with Checkpoint.open(source) as checkpoint, threads_for(checkpoint.model):
            is_nano = source.samefile(NANO)
            texts = calibration_texts(arguments.text, arguments.draws, is_nano=is_nano)
            table = Table(
                {
                    name: Judge(source, path, arguments.passages)
                    for name, path in evaluation_texts(
                        arguments.evaluation, n_per_kind=arguments.per_kind, is_nano=is_nano
                    )
                }
            )
            for part, compare in (
                ("gguf", partial(compare_gguf, arguments.type or TYPES)),
                ("gptq", partial(compare_gptq, arguments.gptq or [ORDER])),
                ("gptqmodel", compare_gptqmodel),
            ):
                if part in chosen:
                    compare(source, texts, table)
    if "memory" in chosen:
        compare_memory()


if __name__ == "__main__":
    main()
