"""llama-cpp-python, compiled for this machine: its flags, and the place its wheel is kept.

The block encoders live in libggml-base, which gets no -march flag from ggml's own build files, so
the flags are given for everything. Contraction is off: a fused multiply-add rounds once where the
reference rounds twice, and a few per cent of the blocks would differ from machine to machine. AMX
is left out: GCC 12 takes its tile configuration for 8 bytes long and drops the other 56 that ggml
writes, so that on a Sapphire Rapids the first product with quantized weights ends the process.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import setup

PACKAGE = "llama-cpp-python"
NATIVE_FLAGS = ("-march=native", "-mcpu=native")  # the second: Macs whose clang lacks the first
OTHER_FLAGS = ("-ffp-contract=off", "-U__AMX_INT8__")
BACKENDS = ("cpu", "cuda", "metal")


@dataclass(frozen=True, slots=True)
class Build:
    """One way to compile llama-cpp-python. `machine`: what the wheel is bound to, as text."""

    version: str
    backend: str
    compiler_flags: tuple[str, ...]
    machine: str

    @property
    def cmake_args(self) -> str:
        """Return CMAKE_ARGS, quoted as a shell would."""
        flags = " ".join(self.compiler_flags)
        options = ["-DGGML_NATIVE=ON", "-DLLAVA_BUILD=OFF"]
        options += [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"] if flags else []
        options += {"cpu": [], "cuda": ["-DGGML_CUDA=ON"], "metal": ["-DGGML_METAL=ON"]}[
            self.backend
        ]
        return shlex.join(options)

    @property
    def key(self) -> str:
        """Return a name that two builds share only when one can stand for the other."""
        text = "\n".join((self.version, self.cmake_args, self.machine))
        return f"{self.version}-{self.backend}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def has_nvidia_gpu() -> bool:
    """Return whether the NVIDIA driver lists a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def chosen_backend() -> str:
    """Return QWQ_BACKEND, or else what suits the machine.

    CUDA wants both its compiler and a GPU: a toolkit alone would cost an hour of compiling for a
    device that is not there. Raises ValueError on an unknown name.
    """
    asked = os.environ.get("QWQ_BACKEND", "")
    if asked and asked not in BACKENDS:
        raise ValueError(f"QWQ_BACKEND: {asked} is none of {', '.join(BACKENDS)}")
    if asked:
        return asked
    if sys.platform == "darwin":
        return "metal"
    return "cuda" if shutil.which("nvcc") and has_nvidia_gpu() else "cpu"


def output_of(command: list[str]) -> str:
    """Return what a command prints on both streams."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=True,
    )
    return done.stdout.decode(errors="replace")


def plan_build(version: str) -> Build:
    """Choose backend and flags, and describe compiler and processor.

    The compiler's predefined macros name its version and every instruction set that it found in
    this processor, which is what decides whether a wheel fits.
    """
    compiler = setup.c_compiler()
    source = "int main(void) { return 0; }\n"
    known = [
        flag for flag in NATIVE_FLAGS if compiler and setup.compiles(compiler, [flag], source, ".c")
    ]
    backend = chosen_backend()
    machine = [platform.system(), platform.machine(), *platform.libc_ver()]
    flags: tuple[str, ...] = ()
    if compiler and known:
        flags = (known[0], *OTHER_FLAGS)
        machine.append(output_of([*compiler.split(), flags[0], "-dM", "-E", "-x", "c", os.devnull]))
    else:  # Visual Studio: its default keeps contraction off, GGML_NATIVE probes the processor
        machine.append(platform.processor())
    if backend == "cuda":
        machine += [output_of(["nvcc", "--version"]), output_of(["nvidia-smi", "-L"])]
    return Build(version, backend, flags, "\n".join(machine))


def cache_folder(build: Build) -> Path:
    """Return where the wheel of this build is kept, outside any clone."""
    if os.name == "nt":
        base = Path(os.environ["LOCALAPPDATA"])
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "qwq-local" / "wheels" / build.key


def cached_wheel(build: Build) -> Path | None:
    """Return the kept wheel of this build, or None."""
    return next(cache_folder(build).glob("*.whl"), None)


def keep_wheel(build: Build, wheel: Path) -> Path:
    """Move a new wheel into the cache, whole or not at all, and return its place."""
    folder = cache_folder(build)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{wheel.name}.partial"
    shutil.copyfile(wheel, partial)
    return partial.replace(folder / wheel.name)
