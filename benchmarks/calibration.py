"""What calibrating buys: time, memory and quality of what is made with it, side by side.

`make bench-calibrate` calibrates a checkpoint (nano-qwq by default) with its Hessians and
sensitivities. Then it makes GGUF files of each type: by llama_model_quantize with the imatrix; by
ours, which has to give the same bytes; with GPTQ rounding; and of the same size with the types that
cost least. And GPTQ folders in two orders of columns, and GPTQModel's, plain and with its own
search of scales, of the same bits and calibration tokens. Quality is the KL of the weights as
stored, computed in float32 on the replies of 1,050 held-out conversations of nano-qwq, of another
checkpoint on those of the evaluation set; its error and that of the difference to
the base, the first line of its kind, are clustered by conversation. Last comes how the memory of
both GPTQ quantizers grows with a model.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.quantizers import REASONING, WORK, compare_memory, gptqmodel, llama_cpp, qwq
from convert.calibration import load_tokenizer, token_batches, tokenize_passage
from convert.checkpoint import Checkpoint
from convert.decode import decode_rows
from convert.errors import QwqError
from convert.files import replacing_file
from convert.gguf_header import GgufHeader, read_header
from convert.gptq_folder import open_gptq
from convert.layer_stream import threads_for
from convert.memory import share_out
from convert.passages import BATCH_TOKENS
from convert.qwen2 import tensor_specs
from quant_eval.nano.corpus import held_out_lines
from quant_eval.suite import read_evaluation_text
from tests.oracles.llama_quantizer import stored_tensors
from tests.processes import Cost

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "quant_eval" / "nano" / "checkpoint"
PARTS = ("gguf", "gptq", "gptqmodel", "memory")
TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
GPTQ_TOKENS = 16_384
HELD_OUT_PER_KIND, HELD_OUT_SEED = 150, 1  # the shipped evaluation text is of another seed
GPTQMODEL_MSE = 2.4  # the exponent that its own examples search scales with

Weights = Mapping[str, torch.Tensor]
Floats = npt.NDArray[np.float64]


class Judge:
    """KL of changed weights against the checkpoint's, in float32, a batch of passages at a time."""

    def __init__(self, source: Path, text: Path | None, n_passages: int | None) -> None:
        from transformers import Qwen2ForCausalLM

        tokenizer = load_tokenizer(source)
        conversations = read_evaluation_text(text)[0][:n_passages]
        passages = [tokenize_passage(one, tokenizer) for one in conversations]
        self._passages = sorted(passages, key=lambda one: len(one.ids))
        ids = [one.ids for one in self._passages]
        self._batches = token_batches(ids, batch_tokens=BATCH_TOKENS)  # in the same order
        self._model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32)
        self._original = {name: value.clone() for name, value in self._model.state_dict().items()}
        with torch.inference_mode():
            self._reference = list(self._logprobs())

    def divergences(self, weights: Weights) -> list[Floats]:
        """KL(checkpoint || weights) in nats of every reply token, by passage."""
        self._model.load_state_dict({**self._original, **weights})
        divergences = []
        with torch.inference_mode():
            for found, expected in zip(self._logprobs(), self._reference, strict=True):
                difference = expected - found
                divergences.append((expected.exp() * difference).sum(dim=-1).numpy())
        return divergences

    def _logprobs(self) -> Iterator[torch.Tensor]:
        """Of every passage's reply: (n_tokens, vocab_size) float64."""
        passages = iter(self._passages)
        for batch in self._batches:
            for logits, passage in zip(self._model(batch.ids).logits, passages, strict=False):
                yield logits[passage.n_prompt - 1 : passage.stop - 1].double().log_softmax(dim=-1)


def clustered(values: list[Floats]) -> tuple[float, float]:
    """Mean and its standard error, passages being drawn together."""
    n = sum(map(len, values))
    mean = sum(float(one.sum()) for one in values) / n
    return mean, float(np.sqrt(sum(float((one - mean).sum()) ** 2 for one in values)) / n)


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


class Table:
    """Lines in Markdown, as they come."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._base: list[Floats] | None = None
        print("| made | KL, nats | of the base's | processor time, s | peak memory, MiB |")
        print("|---|---|---|---|---|", flush=True)

    def line(self, title: str, weights: Weights, cost: Cost, *, is_base: bool = False) -> None:
        found = self._judge.divergences(weights)
        mean, error = clustered(found)
        share = ""
        if is_base:
            self._base, share = found, "the base"
        elif self._base is not None:
            base = clustered(self._base)[0]
            gain, gain_error = clustered(
                [one - other for one, other in zip(found, self._base, strict=True)]
            )
            share = f"{1 + gain / base:.2f} ± {gain_error / base:.2f}"
        print(
            f"| {title} | {mean:.5f} ± {error:.5f} | {share} | {cost.cpu_s:.0f} "
            f"| {cost.peak_nbytes / 2**20:.0f} |",
            flush=True,
        )

    def cost(self, title: str, cost: Cost, quality: str = "") -> None:
        """What was made without a divergence of its own."""
        print(
            f"| {title} | {quality} | | {cost.cpu_s:.0f} | {cost.peak_nbytes / 2**20:.0f} |",
            flush=True,
        )


def held_out_text() -> Path:
    """More of nano-qwq's conversations than are shipped, of which a few tokens decide a type."""
    path = WORK / f"held-out-{HELD_OUT_PER_KIND}-{HELD_OUT_SEED}.jsonl"
    if not path.exists():
        lines = held_out_lines(HELD_OUT_PER_KIND, seed=HELD_OUT_SEED)
        with replacing_file(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    return path


def calibrate(source: Path, text: Path, table: Table) -> Path:
    calibration = WORK / "statistics"
    options = ("--text", text, "--hessians", "--sensitivities", "--device", "cpu")
    table.cost(
        "imatrix, Hessians and sensitivities", qwq(calibration, "calibrate", source, *options)
    )
    return calibration


def compare_gguf(source: Path, calibration: Path, table: Table) -> None:
    given = ("--calibration", calibration, "--threads", "1")
    unquantized = WORK / "BF16.gguf"
    qwq(unquantized, "convert", "gguf", source, "--type", "BF16")
    for name in TYPES:
        theirs, ours = WORK / f"{name}-llama.cpp.gguf", WORK / f"{name}.gguf"
        cost = llama_cpp(theirs, unquantized, name, calibration / "imatrix.gguf")
        title = f"{name}, imatrix, llama_model_quantize"
        table.line(title, gguf_weights(theirs, source), cost, is_base=True)
        cost = qwq(ours, "convert", "gguf", source, "--type", name, *given)
        if stored_tensors(ours) != stored_tensors(theirs):
            raise QwqError(f"{ours}: differs from what llama_model_quantize made")
        table.cost(f"{name}, imatrix, ours", cost, "the same bytes")
        stock = fit_options(source, read_header(theirs))
        for title, options in (
            (f"{name}, GPTQ rounding", ("--type", name, "--rounding", "gptq")),
            ("its size, types that cost least", stock),
            ("its size, types that cost least, GPTQ rounding", (*stock, "--rounding", "gptq")),
        ):
            cost = qwq(ours, "convert", "gguf", source, *options, *given)
            table.line(title, gguf_weights(ours, source), cost)


def fit_options(source: Path, stock: GgufHeader) -> tuple[str, ...]:
    """Options that leave as much for weights as a stock file's tensors take."""
    nbytes = sum(tensor.nbytes for tensor in stock.tensors.values())
    with Checkpoint.open(source) as checkpoint:
        beside = share_out(checkpoint.model, 0, context=1, kv_type="f16", margin_nbytes=1000)
    size = f"{(nbytes - beside.weights) / 1000:.3f}KB"
    return ("--fit", size, "--context", "1", "--margin", "1KB")


def compare_gptq(source: Path, text: Path, table: Table) -> None:
    for order in ("columns", "groups"):
        out = WORK / f"gptq-{order}"
        options = ("--text", text, "--tokens", f"{GPTQ_TOKENS}", "--order", order)
        cost = qwq(out, "convert", "gptq", source, *options)
        table.line(f"GPTQ 4 bit, {order}", gptq_weights(out), cost, is_base=order == "columns")


def compare_gptqmodel(source: Path, text: Path, table: Table) -> None:
    for mse in (0.0, GPTQMODEL_MSE):
        out = WORK / f"gptqmodel-{mse}"
        cost = gptqmodel(out, source, text, n_tokens=GPTQ_TOKENS, mse=mse)
        title = f"GPTQModel 4 bit, {f'its search, {mse}' if mse else 'as it comes'}"
        table.line(title, gptq_weights(out), cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=NANO)
    parser.add_argument("--text", type=Path, default=REASONING, help="to calibrate on")
    parser.add_argument(
        "--evaluation",
        type=Path,
        help="text to score (default: for nano-qwq 1,050 conversations, else the built-in one)",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="of the comparisons")
    parser.add_argument("--passages", type=int, help="of the evaluation set (default: all)")
    arguments = parser.parse_args()
    source = arguments.checkpoint.absolute()
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = arguments.only or PARTS
    if set(chosen) - {"memory"}:
        with Checkpoint.open(source) as checkpoint, threads_for(checkpoint.model):
            text = arguments.evaluation or (held_out_text() if source.samefile(NANO) else None)
            table = Table(Judge(source, text, arguments.passages))
            if "gguf" in chosen:
                compare_gguf(source, calibrate(source, arguments.text, table), table)
            if "gptq" in chosen:
                compare_gptq(source, arguments.text, table)
            if "gptqmodel" in chosen:
                compare_gptqmodel(source, arguments.text, table)
    if "memory" in chosen:
        compare_memory()


if __name__ == "__main__":
    main()
