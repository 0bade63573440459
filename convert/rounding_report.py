"""How matrices were encoded that were rounded with their Hessians: in words and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from convert.encode import QuantType


@dataclass(frozen=True, slots=True)
class Choice:
    """How a matrix was encoded. damp: None where GPTQ rounding was no better on held-out inputs.

    relative_error: its squared output error there, as a part of the plain encoding's.
    raised: dampings that were too little for its Hessian, each with what was tried in its place.
    spoiled: GPTQ rounding was better there, but its weights broke the type's limits.
    """

    name: str
    quant_type: QuantType
    damp: float | None
    relative_error: float
    raised: tuple[tuple[float, float], ...] = ()
    spoiled: bool = False


def parse_choice(record: Mapping[str, Any]) -> Choice:
    """From asdict()'s JSON; raises KeyError, TypeError, ValueError for anything else."""
    quant_type = QuantType(record["quant_type"])
    raised = tuple((before, after) for before, after in record["raised"])
    return Choice(**{**record, "quant_type": quant_type, "raised": raised})


def rounding_lines(choices: Iterable[Choice]) -> list[str]:
    """What was chosen, by quant type."""
    lines = []
    for quant_type, of_type in _by_type(choices).items():
        damps = Counter(choice.damp for choice in of_type if choice.damp is not None)
        n_better = damps.total()
        error = median(choice.relative_error for choice in of_type)
        chosen = ", ".join(f"{damp:g} for {n}" for damp, n in sorted(damps.items()))
        lines.append(
            f"{quant_type.name}: {n_better} of {len(of_type)} matrices rounded with their "
            f"Hessians{f' (damping {chosen})' if chosen else ''}, the others as the imatrix has "
            f"them; median squared error on held-out inputs {error:.2f} of the imatrix encoding's"
        )
        raised = Counter(pair for choice in of_type for pair in choice.raised)
        for (before, after), n in sorted(raised.items()):
            lines.append(
                f"{quant_type.name}: damping {before:g} was too little for the Hessians of {n} "
                f"matrices and {after:g} was tried in its place"
            )
        if n_spoiled := sum(choice.spoiled for choice in of_type):
            lines.append(
                f"{quant_type.name}: {n_spoiled} matrices do not have the encoding that errs "
                "least, since its weights are farther from the source than the type's should be"
            )
    return lines


def rounding_document(choices: Iterable[Choice]) -> list[dict[str, object]]:
    """The same matrix by matrix, as JSON values."""
    return [asdict(choice) | {"quant_type": choice.quant_type.name} for choice in choices]


def _by_type(choices: Iterable[Choice]) -> Mapping[QuantType, Sequence[Choice]]:
    """Choices by quant type, each matrix once, whatever the number of files that hold it."""
    found: dict[QuantType, list[Choice]] = {}
    once = {(choice.quant_type, choice.name): choice for choice in choices}
    for (quant_type, _), choice in sorted(once.items()):
        found.setdefault(quant_type, []).append(choice)
    return found
