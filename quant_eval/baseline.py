"""What files were like when they were found good: enough to pair a later file with each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint, read_json_object
from convert.errors import QwqError, UsageError
from convert.gguf_header import read_header
from convert.gguf_parts import read_model
from convert.metadata_parity import metadata_differences
from convert.provenance import RECIPE
from quant_eval.closeness import Closeness, check_sound, closeness_of
from quant_eval.folder_parity import folder_differences
from quant_eval.measurement import Measured
from quant_eval.metrics import (
    absent_from,
    is_metric,
    metrics_among,
    path_noise,
    samples_of,
    tails_of,
)
from quant_eval.paired import MIN_CLUSTERS, Sample
from quant_eval.results import EvaluationSettings, Report, to_json, write_json

FORMAT = 2
AGAIN = "make the baseline again with `qwq eval baseline`"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a baseline.

    recipe: what it was made by, "" where the file does not say. samples, tails: see metrics; what
    has fewer clusters than MIN_CLUSTERS is left out.
    differences: keys that differ from the checkpoint's, accepted with the file. weights: of each
    tensor, by the file's own names. floor: how far the 16-bit file is from the reference by each
    metric, with this entry's tails: the noise of the path itself.
    """

    name: str
    sha256: str
    recipe: str
    tails: Mapping[str, float]
    samples: Mapping[str, Sample]
    differences: tuple[str, ...]
    weights: Mapping[str, Closeness]
    floor: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Baseline:
    """The entries with all that their numbers depend on."""

    model: str
    checkpoint_sha256: str
    evaluation_sha256: str
    settings: EvaluationSettings
    environment: Mapping[str, str]
    entries: tuple[Entry, ...]


def make_entry(
    measured: Measured,
    checkpoint: Checkpoint,
    *,
    threads: int | None,
    floor: Measured | None = None,
) -> Entry:
    """The entry of a file that was measured; raises QwqError where its tensors are damaged.

    floor: the 16-bit file, whose numbers are kept with those of any other file.
    """
    tails = tails_of(measured)
    path = measured.path
    assert path is not None
    weights, problems = closeness_of(path, checkpoint, threads=threads)
    check_sound(path, checkpoint, problems)
    return Entry(
        name=measured.name,
        sha256=measured.sha256,
        recipe=str(read_header(path).metadata.get(RECIPE, "")) if path.is_file() else "",
        tails=tails,
        samples={
            name: shortened(sample)
            for name, sample in samples_of(measured, tails).items()
            if len(sample.counts) >= MIN_CLUSTERS
        },
        differences=differences_of(path, checkpoint),
        weights=weights,
        floor={} if floor is None or floor.sha256 == measured.sha256 else path_noise(floor, tails),
    )


def differences_of(path: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """In words, each thing that a GGUF file or a GPTQ folder says otherwise than its checkpoint."""
    if path.is_dir():
        return tuple(folder_differences(path, checkpoint))
    found = metadata_differences(read_model(path), checkpoint)
    return tuple(f"{one.key} {one.words}" for one in found)


def summarize_entry(entry: Entry) -> dict[str, Any]:
    """For a JSON document: what was measured, each with its n and error, and what was not."""
    metrics = []
    for name, metric in metrics_among(entry.samples).items():
        mean = entry.samples[name].mean
        if mean is not None:
            floor = {"floor": entry.floor[name]} if name in entry.floor else {}
            metrics.append({"name": name, "title": metric.title, **asdict(mean), **floor})
    return {
        "name": entry.name,
        "sha256": entry.sha256,
        "metrics": metrics,
        "not_measured": absent_from(entry.samples),
        "differences": list(entry.differences),
        "n_tensors": len(entry.weights),
    }


def save_baseline(path: Path, report: Report, entries: Sequence[Entry]) -> None:
    """Write entries with what the report says of the conditions; same input, same bytes."""
    document = {
        "format": FORMAT,
        "model": report.model,
        "checkpoint_sha256": report.checkpoint_sha256,
        "evaluation_sha256": report.evaluation_sha256,
        "settings": to_json(report.settings),
        "environment": to_json(report.environment),
        "entries": [_entry_to_json(entry) for entry in entries],
    }
    write_json(path, document)


def load_baseline(path: Path) -> Baseline:
    """Raises QwqError where there is none, or one of another format."""
    if not path.is_file():
        raise QwqError(f"{path}: no such file; {AGAIN}")
    data = read_json_object(path)
    if data.get("format") != FORMAT:
        raise QwqError(f"{path}: has format {data.get('format')} and {FORMAT} is read; {AGAIN}")
    try:
        return Baseline(
            model=data["model"],
            checkpoint_sha256=data["checkpoint_sha256"],
            evaluation_sha256=data["evaluation_sha256"],
            settings=EvaluationSettings(
                **data["settings"] | {"needles": tuple(data["settings"].get("needles", ()))}
            ),
            environment=data["environment"],
            entries=tuple(map(_entry_from_json, data["entries"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QwqError(f"{path}: is no baseline ({error!r}); {AGAIN}") from error


def find_entry(baseline: Baseline, file: Path, against: str | None, source: Path) -> Entry:
    """The entry named, or that of the file's own name, or the only one.

    Raises UsageError that lists the entries where none of these is there.
    """
    wanted = against or file.name
    names = [entry.name for entry in baseline.entries]
    if wanted in names:
        return baseline.entries[names.index(wanted)]
    if against is None and len(names) == 1:
        return baseline.entries[0]
    raise UsageError(
        f"{source}: has no entry {wanted}; choose one with --against: {', '.join(names)}"
    )


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    """Lists of numbers are strings with blanks between them, one a line of the file."""
    return {
        "name": entry.name,
        "sha256": entry.sha256,
        "recipe": entry.recipe,
        "tails": {name: float(f"{value:.6g}") for name, value in entry.tails.items()},
        "samples": {name: _sample_to_json(sample) for name, sample in entry.samples.items()},
        "floor": {name: float(f"{value:.6g}") for name, value in entry.floor.items()},
        "differences": list(entry.differences),
        "weights": {
            "tensors": " ".join(entry.weights),
            "errors": " ".join(f"{one.relative:.6g}" for one in entry.weights.values()),
            "scales": " ".join(f"{one.scale:.6g}" for one in entry.weights.values()),
        },
    }


def _entry_from_json(data: Mapping[str, Any]) -> Entry:
    names, errors, scales = (
        data["weights"][key].split() for key in ("tensors", "errors", "scales")
    )
    return Entry(
        name=data["name"],
        sha256=data["sha256"],
        recipe=data["recipe"],
        tails=data["tails"],
        samples={
            name: _sample_from_json(one) for name, one in data["samples"].items() if is_metric(name)
        },
        differences=tuple(data["differences"]),
        weights={
            name: Closeness(float(error), float(scale))
            for name, error, scale in zip(names, errors, scales, strict=True)
        },
        floor={name: float(value) for name, value in data.get("floor", {}).items()},
    )


CLUSTER_CHARACTERS = 16  # of a cluster's digest: enough to tell 100,000 apart


def _sample_to_json(sample: Sample) -> dict[str, str]:
    return {
        "clusters": " ".join(name[:CLUSTER_CHARACTERS] for name in sample.counts),
        "counts": " ".join(str(n) for n in sample.counts.values()),
        "sums": " ".join(f"{sample.sums[name]:.6g}" for name in sample.counts),
    }


def _sample_from_json(data: Mapping[str, str]) -> Sample:
    names = data["clusters"].split()
    counts = dict(zip(names, map(int, data["counts"].split()), strict=True))
    return Sample(dict(zip(names, map(float, data["sums"].split()), strict=True)), counts)


def shortened(sample: Sample) -> Sample:
    """With clusters under the names that a baseline keeps, and its precision."""
    return _sample_from_json(_sample_to_json(sample))
