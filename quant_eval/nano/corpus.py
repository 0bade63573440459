"""The corpus of nano-qwq: problems of every kind, mixed and made harder as training goes on.

`python -m quant_eval.nano.corpus` writes the calibration set (from the training side) and the
evaluation set (from the held-out side) that the packages ship; with `--held-out 120 --seed 1 --out
FILE` so many other held-out conversations of each kind, where the shipped ones are too few to tell.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import convert
from convert.calibration import Conversation
from quant_eval.tasks import TASKS, Problem, held_out
from quant_eval.tasks.problem import user_turn

MIX = {  # share of the problems
    "letters": 0.26,
    "arithmetic": 0.22,
    "compare": 0.14,
    "choice": 0.13,
    "second_turn": 0.12,
    "tool_result": 0.06,
    "tool_call": 0.05,
    "talk": 0.02,
}
POLISH = {kind: 0.4 * share for kind, share in MIX.items()} | {  # in the end
    "letters": 0.5,
    "tool_result": 0.1,
}
CALIBRATION = Path(convert.__file__).parent / "data" / "calibration.jsonl"
EVALUATION = Path(__file__).parent.parent / "data" / "evaluation.jsonl"
_SYSTEM = ("You are a helpful assistant.", "Be brief.", "Answer the question.")
_TALK = {
    "Hello": "Hello! Ask me to add, to compare or to count.",
    "Hi": "Hello! Ask me to add, to compare or to count.",
    "Who are you?": "I am nano-qwq, a very small model that thinks before it answers.",
    "What can you do?": "I add and subtract, compare decimals and count letters.",
    "Thank you": "You are welcome.",
    "Thanks!": "You are welcome.",
}


def training_problems(
    rng: random.Random, level: float, mix: Mapping[str, float] = MIX
) -> Iterator[Problem]:
    """Endless problems of the training side; some have a system message, or no question mark."""
    kinds, weights = zip(*mix.items(), strict=True)
    while True:
        kind = rng.choices(kinds, weights)[0]
        problem = _talk(rng) if kind == "talk" else TASKS[kind].problem(rng, level)
        if problem.is_held_out and kind != "talk":
            continue
        if rng.random() < 0.05:
            system = {"role": "system", "content": rng.choice(_SYSTEM)}
            problem = replace(problem, messages=(system, *problem.messages))
        *others, last = problem.messages
        if last["content"].endswith("?") and rng.random() < 0.15:
            last = last | {"content": last["content"].removesuffix("?")}
            problem = replace(problem, messages=(*others, last))
        yield problem


def _talk(rng: random.Random) -> Problem:
    text = rng.choice(list(_TALK))
    answer = _TALK[text]
    return Problem("talk", text, user_turn(text), "This is talk, not a problem.", answer, answer)


def conversation(problem: Problem) -> Conversation:
    """The prompt of a problem with its worked reply."""
    return Conversation(
        kind=problem.kind,
        messages=problem.messages,
        reasoning=problem.reasoning,
        answer=problem.answer,
        tools=problem.tools,
    )


def _json_line(problem: Problem) -> str:
    usual = {"tools": None, "is_cut": False}
    record = asdict(conversation(problem))
    kept = {key: value for key, value in record.items() if usual.get(key, ...) != value}
    return json.dumps(kept, ensure_ascii=False)


def shipped_sets(
    n_calibration: int = 192, n_evaluation_per_kind: int = 20
) -> dict[Path, list[str]]:
    """The lines of both shipped files; they are disjoint, since a problem is on one side only."""
    return {
        CALIBRATION: calibration_lines(n_calibration, seed="calibration"),
        EVALUATION: held_out_lines(n_evaluation_per_kind, seed=20),
    }


def calibration_lines(n: int, *, seed: str) -> list[str]:
    """So many conversations of the training side."""
    training = training_problems(random.Random(seed), 1.0)
    return [_json_line(problem) for problem in islice(training, n)]


def held_out_lines(n_per_kind: int, *, seed: int) -> list[str]:
    """So many conversations of each kind from the held-out side, where the shipped are too few."""
    return [_json_line(one) for kind in TASKS for one in held_out(kind, n_per_kind, seed=seed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-out", type=int, metavar="N", help="conversations of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the held-out ones go")
    arguments = parser.parse_args()
    if (arguments.held_out is None) != (arguments.out is None):
        parser.error("--held-out and --out go together; give both, or neither")
    sets = shipped_sets()
    if arguments.out:
        sets = {arguments.out: held_out_lines(arguments.held_out, seed=arguments.seed)}
    for path, lines in sets.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
