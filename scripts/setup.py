"""Set up .venv: say first what the machine lacks, then install. `make setup` runs this file.

It parses and runs under Python 3.6 as well: an old Python gets an answer and no SyntaxError.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

LEAST_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.14")

SYSTEMS = ("Debian, Ubuntu", "Fedora", "macOS", "Windows")
PYTHON, VENV, HEADERS, COMPILER = (
    "Python 3.11 or newer",
    "Python's venv and pip",
    "Python's C headers",
    "a C++17 compiler",
)
REMEDIES = {
    PYTHON: (
        "sudo apt install python3 python3-venv python3-dev",
        "sudo dnf install python3 python3-devel",
        "brew install python@3.13",
        "winget install Python.Python.3.13",
    ),
    VENV: (
        "sudo apt install python3-venv",
        "sudo dnf install python3 python3-pip",
        "brew install python@3.13",
        "winget install Python.Python.3.13",
    ),
    HEADERS: (
        "sudo apt install python3-dev",
        "sudo dnf install python3-devel",
        "brew install python@3.13",
        "winget install Python.Python.3.13",
    ),
    COMPILER: (
        "sudo apt install build-essential cmake",
        "sudo dnf install gcc-c++ cmake",
        "xcode-select --install && brew install cmake",
        "winget install Kitware.CMake Microsoft.VisualStudio.2022.BuildTools (with C++)",
    ),
}


def newer_python() -> "str | None":
    """Return the path of a Python that is new enough and can make environments, or None."""
    for name in NEWER_PYTHONS:
        path = shutil.which(name)
        check = [path or name, "-c", "import ensurepip, venv"]
        if path and subprocess.call(check, stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def compiler(variable: str, names: "tuple[str, ...]") -> "str | None":
    """Return the first compiler that is there; the environment's variable goes first."""
    candidates = (os.environ.get(variable, ""), *names)
    return next((name for name in candidates if name and shutil.which(name.split()[0])), None)


def c_compiler() -> "str | None":
    """Return the command of the C compiler."""
    return compiler("CC", ("cc", "gcc", "clang"))


def compiles(command: str, flags: "list[str]", source: str, suffix: str) -> bool:
    """Return whether a compiler takes these flags and this source."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        path.write_text(source, encoding="ascii")
        arguments = [*command.split(), *flags, "-c", str(path), "-o", f"{path}.o"]
        quiet = subprocess.DEVNULL
        return subprocess.call(arguments, stdout=quiet, stderr=quiet) == 0


def has_cxx17() -> bool:
    """Return whether there is a C compiler, and a C++ compiler with C++17 and its headers."""
    if os.name == "nt":  # cmake finds Visual Studio by itself, through this program
        programs = Path(os.environ.get("PROGRAMFILES(X86)", ""))
        where = programs / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
        return shutil.which("cl") is not None or where.exists()
    cxx = compiler("CXX", ("c++", "g++", "clang++"))
    source = "#include <filesystem>\nstd::filesystem::path here;\n"
    return bool(c_compiler() and cxx and compiles(cxx, ["-std=c++17"], source, ".cpp"))


def missing() -> "list[str]":
    """Return what this machine lacks, as keys of REMEDIES.

    cmake and ninja are not among them: where they are missing or too old, the build of
    llama-cpp-python takes them from pip.
    """
    if sys.version_info < LEAST_PYTHON:
        return [PYTHON]
    headers = Path(sysconfig.get_paths()["include"])
    checks = {
        VENV: all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")),
        HEADERS: (headers / "Python.h").exists(),
        COMPILER: has_cxx17(),
    }
    return [name for name, is_there in checks.items() if not is_there]


def main() -> int:
    """Check this machine, then install; return 1 where something is missing."""
    running = sys.version.split()[0]
    newer = newer_python() if sys.version_info < LEAST_PYTHON else None
    if newer:
        print(f"setup: Python {running} is too old; going on with {newer}", flush=True)
        return subprocess.call([newer, *sys.argv])
    lacking = missing()
    for name in lacking:
        found = f", and this is {running}" if name == PYTHON else ""
        print(f"setup: needs {name}{found}; install it, then run the same command again:")
        for system, command in zip(SYSTEMS, REMEDIES[name]):
            print(f"  {system:<15} {command}")
    if lacking:
        return 1
    import install  # it may be written for the Python that was just checked

    return install.main()


if __name__ == "__main__":
    sys.exit(main())
