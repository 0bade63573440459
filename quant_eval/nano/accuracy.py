"""How many held-out problems the unquantized model solves, in batches through transformers.

`python -m quant_eval.nano.accuracy` prints the table of nano-qwq's card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from quant_eval.nano import CHECKPOINT
from quant_eval.tasks import TASKS, Problem, grade, held_out

MAX_NEW_TOKENS = 256
N_PROBLEMS = 100  # of each kind, in the card's table


def prompt_text(tokenizer: Any, problem: Problem) -> str:
    """The prompt, rendered by the checkpoint's template; the reply starts inside the thought."""
    text: str = tokenizer.apply_chat_template(
        list(problem.messages),
        tools=list(problem.tools) if problem.tools else None,
        add_generation_prompt=True,
        tokenize=False,
    )
    return text


def accuracy(
    model: Any, tokenizer: Any, *, n_problems: int, greedy: bool, seed: int = 1
) -> dict[str, float]:
    """Share of solved problems by kind, of n_problems each, greedy or with QwQ's sampling."""
    scores = {}
    torch.manual_seed(seed)
    for kind in TASKS:
        problems = held_out(kind, n_problems, seed)
        answers = _answers(model, tokenizer, problems, greedy)
        solved = sum(
            grade(problem, answer, tool_calls(answer))
            for problem, answer in zip(problems, answers, strict=True)
        )
        scores[kind] = solved / n_problems
    return scores


def _answers(model: Any, tokenizer: Any, problems: list[Problem], greedy: bool) -> Iterator[str]:
    prompts = [prompt_text(tokenizer, problem) for problem in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    sampled = {"do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.95}
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **({"do_sample": False} if greedy else sampled),
        )
    replies = ids[:, inputs["input_ids"].shape[1] :]
    for text in tokenizer.batch_decode(replies, skip_special_tokens=True):
        yield text.partition("</think>")[2].strip()


def tool_calls(answer: str) -> list[dict[str, Any]]:
    """The calls in an answer; what is not JSON is no call."""
    calls = []
    for body in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer, flags=re.S):
        try:
            call = json.loads(body)
        except json.JSONDecodeError:
            continue
        if isinstance(call, dict) and isinstance(call.get("arguments"), dict) and "name" in call:
            calls.append(call)
    return calls


def load_reference() -> tuple[Any, Any]:
    """The bundled model, its bfloat16 weights widened to float32, and its tokenizer."""
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(CHECKPOINT)


def main() -> None:
    """Print the share of solved problems by kind, as rows of a Markdown table."""
    model, tokenizer = load_reference()
    greedy, sampled = (
        accuracy(model, tokenizer, n_problems=N_PROBLEMS, greedy=is_greedy)
        for is_greedy in (True, False)
    )
    print("| kind | greedy | sampled |\n|---|---|---|")
    for kind in TASKS:
        print(f"| {kind} | {greedy[kind]:.2f} | {sampled[kind]:.2f} |")


if __name__ == "__main__":
    main()
