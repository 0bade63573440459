"""Pin every package that a full install takes: `make constraints` rewrites constraints.txt.

It resolves pyproject.toml with all extras as if nothing were installed, and installs nothing. Run
it where a CPU build of torch is chosen, so that the file names no CUDA packages; where torch brings
them, torch itself asks for their exact versions.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from install import EXTRAS, ROOT

BUILD_TOOLS = ("scikit-build-core", "cmake", "ninja")  # of llama-cpp-python's isolated build

# Versions that others cannot follow: newer ones exist, and resolving alone would take them.
HELD = (
    "torch==2.13.0",  # newest that gptqmodel 7.6 was tried with, and the CPU build at hand
    "transformers==5.23.0",  # greedy ids and template cases are compared with this one
    "llama-cpp-python==0.3.36",  # the exactness tests are against this llama.cpp
    "gguf==0.19.0",  # the container's keys, as that llama.cpp reads them
    "gptqmodel==7.6.0",  # 7.7 asks for torch 2.14
)
# gptqmodel asks for exactly numpy 2.2.6 below Python 3.14, and for a newer one from there on.
BY_PYTHON = {
    "numpy": ('2.2.6; python_version < "3.14"', '2.4.6; python_version >= "3.14"'),
}


def canonical(name: str) -> str:
    """Return the one spelling that indexes use for a package name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolved() -> dict[str, str]:
    """Return name -> version of everything a full install takes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "held.txt"
        held.write_text("\n".join(HELD) + "\n", encoding="utf-8")
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--report", str(report), "--constraint", str(held)]
        subprocess.run([*command, *BUILD_TOOLS, f"{ROOT}[{EXTRAS}]"], check=True)
        packages = json.loads(report.read_text(encoding="utf-8"))["install"]
    named = ((item["metadata"]["name"], item["metadata"]["version"]) for item in packages)
    return {
        canonical(name): version.partition("+")[0]
        for name, version in named
        if canonical(name) != "qwq-local"
    }


def main() -> None:
    """Write constraints.txt."""
    lines = ["# Made by `make constraints`; every package of a full install, transitive ones too."]
    for name, version in sorted(resolved().items()):
        lines += [f"{name}=={pin}" for pin in BY_PYTHON.get(name, (version,))]
    (ROOT / "constraints.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(lines) - 1} pins")


if __name__ == "__main__":
    main()
