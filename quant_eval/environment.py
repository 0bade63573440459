"""Where a measurement was made, as far as its speeds and numbers depend on it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "qwq-local",
    "llama-cpp-python",
    "gguf",
    "torch",
    "transformers",
    "gptqmodel",
    "numpy",
)


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


def _processor() -> str:
    """The processor's name; Linux keeps it in a file, elsewhere Python knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
