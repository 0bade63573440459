"""Train a Qwen2 checkpoint unlike nano-qwq, to see whether what holds for one holds for another.

It is wider and shallower, its output matrix is its embeddings, its vocabulary is five times as
large, and it was trained by another route on another language: source code, Python's standard
library, which is wherever this runs. So its errors are spread over all tokens where nano-qwq's
come from few. Half an hour on two cores. Beside it go calibration.jsonl and evaluation.jsonl, of
modules that it was trained on and of modules that it was not: `make bench-second` compares on them.
"""

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from convert.calibration import Conversation, tokenize_conversation
from quant_eval.nano import CHECKPOINT
from quant_eval.nano.train import descend, make_optimizers

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "second-checkpoint"
LIBRARY = Path(sysconfig.get_path("stdlib"))
PASSAGE_CHARACTERS = 1500
HELD_OUT_EVERY = 16  # of the modules
N_CALIBRATION, N_EVALUATION = 400, 40
VOCAB_SIZE = 4096
TOKENS_PER_STEP = 4096
MUON_LR, ADAM_LR = 0.02, 3e-3  # fall to zero in a straight line
WARMUP_STEPS = 30


def modules() -> list[Path]:
    """The standard library's own modules, without its tests, in the order of their names."""
    inside = (path.relative_to(LIBRARY) for path in LIBRARY.rglob("*.py"))
    foreign = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    return [LIBRARY / path for path in sorted(inside) if not foreign & set(path.parts)]


def conversations(paths: Sequence[Path]) -> Iterator[Conversation]:
    """Passages of source code, the first half as a thought and the second as the answer."""
    for path in paths:
        text = path.read_text(errors="replace")
        for start in range(0, len(text) - PASSAGE_CHARACTERS, PASSAGE_CHARACTERS):
            passage = text[start : start + PASSAGE_CHARACTERS]
            middle = passage.find("\n", PASSAGE_CHARACTERS // 2)
            if middle < 0 or not passage[:middle].strip() or not passage[middle:].strip():
                continue
            asked = f"Show {path.relative_to(LIBRARY).as_posix()} from character {start} on."
            yield Conversation(
                kind="code",
                messages=({"role": "user", "content": asked},),
                reasoning=passage[:middle].strip(),
                answer=passage[middle:].strip(),
            )


def write_text(path: Path, chosen: Sequence[Conversation]) -> None:
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in chosen))


def new_model(tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        tie_word_embeddings=True,
        bos_token_id=pad,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return Qwen2ForCausalLM(config)


def train(model: Any, tokenizer: Any, texts: Sequence[Conversation], n_tokens: int) -> None:
    """Train on n_tokens tokens of the texts, drawn anew each time that they end."""
    optimizers = make_optimizers(model)
    n_seen = step = 0
    with Progress() as bars:
        bar = bars.add_task("tokens", total=n_tokens)
        while n_seen < n_tokens:
            drawn = random.sample(texts, 64)
            examples = [tokenize_conversation(one, tokenizer) for one in drawn]
            n_of_batch = max(1, TOKENS_PER_STEP // max(len(one.ids) for one in examples))
            for start in range(0, len(examples), n_of_batch):
                batch = examples[start : start + n_of_batch]
                factor = max(0.0, 1 - n_seen / n_tokens) * min(1.0, (step + 1) / WARMUP_STEPS)
                rates = (factor * MUON_LR, factor * ADAM_LR)
                loss = descend(model, optimizers, rates, batch, tokenizer.pad_token_id)
                step += 1
                n_seen += sum(len(one.ids) for one in batch)
                bars.update(bar, completed=n_seen)
            bars.console.print(f"{n_seen:>10,} tokens  loss {loss:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    random.seed(0)
    torch.manual_seed(0)
    paths = modules()
    held_out = list(conversations(paths[::HELD_OUT_EVERY]))
    trained_on = list(conversations([one for one in paths if one not in paths[::HELD_OUT_EVERY]]))
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "calibration.jsonl", random.sample(trained_on, N_CALIBRATION))
    write_text(options.out / "evaluation.jsonl", random.sample(held_out, N_EVALUATION))
    nano = AutoTokenizer.from_pretrained(CHECKPOINT)
    code = (one.reasoning + one.answer for one in trained_on)
    tokenizer = nano.train_new_from_iterator(code, VOCAB_SIZE, show_progress=False)
    tokenizer.save_pretrained(options.out)
    model = new_model(tokenizer)
    train(model, tokenizer, trained_on, options.tokens)
    model.to(torch.bfloat16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
