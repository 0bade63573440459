"""From what was measured of a file to its row of the report, held against 16-bit files."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from convert.checkpoint import read_json_object
from convert.gguf_header import read_header
from convert.provenance import RECIPE
from quant_eval.behaviour import median_of, summarize_behaviour
from quant_eval.divergence import Divergence, Estimate, summarize, tail
from quant_eval.layers import LayerErrors
from quant_eval.measurement import Measured
from quant_eval.paired import MIN_CLUSTERS, Sample, paired_difference
from quant_eval.results import (
    UNQUANTIZED_BITS,
    Accuracy,
    Attempt,
    Example,
    FileResult,
    Flip,
    Floor,
    Speed,
    TaskLoss,
)
from quant_eval.sizes import model_size

MAX_FLIPS = 3  # shown of a file


def file_result(
    measured: Measured,
    *,
    floor: Measured | None = None,
    exact: Measured | None = None,
    layers: LayerErrors | None = None,
) -> FileResult:
    """The report's row of a file.

    floor: the 16-bit file of its engine, which shows the noise of the path. exact: the 16-bit file
    that its replies are held against.
    """
    path = measured.path
    size = None if path is None else model_size(path)
    if floor is not None and (floor is measured or _is_unquantized(measured)):
        floor = None
    if exact is measured:
        exact = None
    return FileResult(
        name=measured.name,
        sha256=measured.sha256,
        nbytes=None if size is None else size.nbytes,
        bits_per_weight=None if size is None else size.bits_per_weight,
        engine=measured.engine,
        divergence=_divergence(measured),
        accuracy=_accuracy(measured.attempts),
        behaviour=summarize_behaviour(measured.attempts),
        speed=_speed((*measured.attempts, *measured.questions)),
        examples=tuple(
            Example(one.question, one.reasoning, one.answer, one.finish_reason)
            for one in measured.questions
        ),
        elapsed_s=round(measured.elapsed_s, 1),
        recipe=None if path is None else _recipe(path),
        overall_accuracy=Accuracy.of(measured.attempts) if measured.attempts else None,
        floor=None if floor is None else Floor(floor.name, floor.sha256, _divergence(floor)),
        task_loss=None if exact is None else _task_loss(exact, measured),
        thought_change=None if exact is None else _thought_change(exact, measured),
        flips=() if exact is None else tuple(_flips(exact, measured)[:MAX_FLIPS]),
        kl_tail=tail(list(measured.scores.values())),
        layers=layers,
    )


def find_floor(measured: Sequence[Measured], engine: str) -> Measured | None:
    """The first file of the engine whose weights are not quantized and whose KL is known.

    It differs from the reference by the noise of that engine's path, which is not another's.
    """
    return next(
        (one for one in measured if one.engine == engine and one.scores and _is_unquantized(one)),
        None,
    )


def find_exact(measured: Sequence[Measured], engine: str) -> Measured | None:
    """The 16-bit file to hold replies against: of the same engine where there is one."""
    whole = [one for one in measured if one.attempts and _is_unquantized(one)]
    return next((one for one in whole if one.engine == engine), whole[0] if whole else None)


def distinct_names(measured: Sequence[Measured]) -> list[str]:
    """The files' names; those that several have with as many folders as tell them apart."""
    names = [one.name for one in measured]
    n_parts = 1
    while len(set(names)) < len(names) and n_parts < 8:
        n_parts += 1
        names = [
            "/".join(one.path.absolute().parts[-n_parts:])
            if one.path is not None and names.count(name) > 1
            else name
            for one, name in zip(measured, names, strict=True)
        ]
    return names


def _is_unquantized(measured: Measured) -> bool:
    path = measured.path
    return path is not None and model_size(path).bits_per_weight >= UNQUANTIZED_BITS


def _divergence(measured: Measured) -> dict[str, Divergence]:
    kinds = [measured.kinds[name] for name in measured.scores] if measured.kinds else ()
    return summarize(list(measured.scores.values()), kinds)


def _recipe(path: Path) -> str | None:
    """What the file says that it was made by."""
    if path.is_file():
        recipe = read_header(path).metadata.get(RECIPE)
        return None if recipe is None else str(recipe).strip()
    found = read_json_object(path / "config.json").get("quantization_config")
    match found:
        case {"quant_method": str(method), "bits": int(bits), "group_size": int(size)}:
            return f"{method} at {bits} bits, groups of {size}"
        case _:
            return None


def _task_loss(exact: Measured, measured: Measured) -> TaskLoss | None:
    before, after = (
        Sample.of((each.problem, each.correct) for each in one.attempts if each.correct is not None)
        for one in (exact, measured)
    )
    difference = paired_difference(before, after, of_shares=True)
    if difference is None:
        return None
    if difference.n < MIN_CLUSTERS:
        return TaskLoss(difference.value, None, None, difference.n)
    return TaskLoss(difference.value, *difference.interval(0.95), difference.n)


def _thought_change(exact: Measured, measured: Measured) -> Estimate | None:
    """By how many tokens thoughts are longer, problem by problem."""
    before, after = (
        Sample.of((each.problem, each.thought_tokens) for each in one.attempts)
        for one in (exact, measured)
    )
    difference = paired_difference(before, after)
    if difference is None:
        return None
    return Estimate(difference.value, difference.standard_error, difference.n)


def _flips(exact: Measured, measured: Measured) -> list[Flip]:
    """Problems that the 16-bit file solved and the other did not, the surest ones first."""
    theirs = {(one.problem, one.seed): one for one in exact.attempts}
    pairs: defaultdict[str, list[tuple[Attempt, Attempt]]] = defaultdict(list)
    for attempt in measured.attempts:
        reference = theirs.get((attempt.problem, attempt.seed))
        if reference is None or reference.correct is None or attempt.correct is None:
            continue
        pairs[attempt.problem].append((reference, attempt))
    flips = []
    for replies in pairs.values():
        n_before = sum(bool(before.correct) for before, _ in replies)
        n_after = sum(bool(after.correct) for _, after in replies)
        if n_before - n_after < min(2, len(replies)):
            continue
        reference, attempt = next(
            (before, after) for before, after in replies if before.correct and not after.correct
        )
        flips.append(
            Flip(
                question=attempt.question,
                reference_reasoning=reference.reasoning,
                reference_answer=reference.answer,
                reasoning=attempt.reasoning,
                answer=attempt.answer,
                n_solved=n_after,
                n_reference_solved=n_before,
                n_replies=len(replies),
            )
        )
    return sorted(flips, key=lambda one: (one.n_solved - one.n_reference_solved) / one.n_replies)


def _accuracy(attempts: Sequence[Attempt]) -> dict[str, Accuracy]:
    kinds = dict.fromkeys(one.kind for one in attempts)
    return {kind: Accuracy.of([one for one in attempts if one.kind == kind]) for kind in kinds}


def _speed(attempts: Sequence[Attempt]) -> Speed | None:
    speeds = [(one.problem, one.tokens_per_s) for one in attempts if one.tokens_per_s is not None]
    if not speeds:
        return None
    return Speed(median_of(speeds), max(one.at_once for one in attempts))
