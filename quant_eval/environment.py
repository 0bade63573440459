"""Where a measurement was made, as far as its speeds and numbers depend on it."""

import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import convert
import quant_eval
import qwq_local
from convert.files import sha256_of
from quant_eval.manifest import digest

PACKAGES = (
    "qwq-local",
    "llama-cpp-python",
    "gguf",
    "torch",
    "transformers",
    "gptqmodel",
    "numpy",
)

SHOWING = ("cli", "report", "plot", "curves", "terminal", "options", "gate", "baseline", "server")
"""Modules and folders, by the end of their name, that show or judge numbers and make none."""


def describe_environment() -> dict[str, str]:
    """System, processor, and the versions of the packages whose numbers these are."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def sources_sha256() -> str:
    """One hash of these packages' own modules that prompt, run, score and grade.

    Beside it a version says little: it stays the same while the code changes.
    """
    return modules_sha256([Path(one.__path__[0]) for one in (convert, quant_eval, qwq_local)])


def modules_sha256(packages: Sequence[Path]) -> str:
    """One hash of the modules in these folders, except those that make no number."""
    hashes = {}
    for folder in packages:
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            if not any(part.endswith(SHOWING) for part in parts):
                hashes[f"{folder.name}/{'/'.join(parts)}"] = sha256_of(file)
    return digest(hashes)


def _processor() -> str:
    """The processor's name; Linux keeps it in a file, elsewhere Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
