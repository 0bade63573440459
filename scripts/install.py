"""Make .venv and install everything at its pinned version, with progress and a log.

Called by setup.py once the machine has what this needs. Standard library only.
"""

import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_wheel

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "constraints.txt"
LOG = ROOT / "build" / "setup.log"
EXTRAS = "gptq,eval,server,web,dev"
N_STEPS = 4
QUIET_S = 30.0  # without a terminal, say at least this often that work goes on
COMPILER_STEP = re.compile(rb"\[(\d+)/(\d+)\] ")
PIP_STEP = re.compile(
    rb"\s*(Collecting|Downloading|Building wheel for|Installing collected) ?(\S*)"
)


class SetupError(Exception):
    """A step that failed, with what to do about it."""


@dataclass(slots=True)
class Step:
    """One line of progress, rewritten on a terminal, repeated now and then elsewhere."""

    number: int
    title: str
    started_s: float
    shown_s: float

    def show(self, note: str, *, last: bool = False) -> None:
        """Print the step with its note and the time it has taken."""
        now_s = time.monotonic()
        is_terminal = sys.stdout.isatty()
        if not last and now_s - self.shown_s < (0.2 if is_terminal else QUIET_S):
            return
        self.shown_s = now_s
        minutes, seconds = divmod(int(now_s - self.started_s), 60)
        line = f"[{self.number}/{N_STEPS}] {self.title}: {note} ({minutes}:{seconds:02d})"
        if is_terminal:
            print(f"\r\033[K{line[:100]}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


@contextmanager
def step(number: int, title: str) -> Iterator[Step]:
    """Announce a step, and say at its end that it is done."""
    line = Step(number, title, time.monotonic(), 0.0)
    line.show("...")
    yield line
    line.show("done", last=True)


def compile_note(line: bytes) -> str | None:
    """Return how far the compiler is, or pip before it starts, if a line of their output tells."""
    found = COMPILER_STEP.search(line)
    return f"compiling {int(found[1])} of {int(found[2])}" if found else pip_note(line)


def pip_note(line: bytes) -> str | None:
    """Return what pip is doing, if a line of its output tells."""
    found = PIP_STEP.match(line)
    return f"{found[1].decode()} {found[2].decode()}".strip().lower() if found else None


def ticking_lines(process: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """Yield a process's lines of output, and None in every second without one."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    assert process.stdout is not None
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(b"")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        yield line


def run(
    command: list[str],
    progress: Step,
    note_of: Callable[[bytes], str | None],
    *,
    environment: dict[str, str] | None = None,
    remedy: str,
) -> None:
    """Run a command into the log and show how far it is.

    Raises SetupError, with the end of the output and the remedy, where the command fails.
    """
    tail: list[bytes] = []
    note = "starting"
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            for line in ticking_lines(process):
                if line is not None:
                    log.write(line)
                    tail = [*tail[-29:], line]
                    note = note_of(line) or note
                progress.show(note)
    if process.returncode != 0:
        end = b"".join(tail).decode(errors="replace").rstrip()
        raise SetupError(f"{end}\n\nsetup: {progress.title} failed; {remedy}; all output: {LOG}")


def pinned(package: str) -> str:
    """Return the version that constraints.txt names for a package."""
    found = re.search(rf"^{package}==(\S+)$", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    assert found is not None, f"constraints.txt has no {package}"
    return found[1]


def pip(*arguments: str) -> list[str]:
    """Return the environment's pip with arguments."""
    return [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]


def make_environment(progress: Step) -> None:
    """Create .venv, or create it anew where its Python is another one than this."""
    probe = "import sys; print(sys.version_info[:2])"
    if PYTHON.exists():
        found = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=False)
        if found.stdout.strip() == str(sys.version_info[:2]):
            return
    progress.show(f"Python {sys.version.split()[0]}")
    venv.create(VENV, clear=True, with_pip=True, symlinks=os.name != "nt")


def install_llama(build: llama_wheel.Build, progress: Step) -> None:
    """Install the build of llama-cpp-python: kept from before if there is one, else compiled."""
    marker = VENV / "llama-cpp-python.key"  # what is installed; the version alone would not tell
    if marker.exists() and marker.read_text("utf-8") == build.key:
        return
    kept = llama_wheel.cached_wheel(build)
    if kept is None:
        kept = compile_llama(build, progress)
    remedy = f"delete {kept.parent} and run the same command again"
    arguments = ("install", "--force-reinstall", "--no-deps", str(kept))
    run(pip(*arguments), progress, pip_note, remedy=remedy)
    marker.write_text(build.key, "utf-8")


def compile_llama(build: llama_wheel.Build, progress: Step) -> Path:
    """Compile the wheel and keep it for the next clone.

    pip's own cache knows the version alone and would hand out a wheel with other flags.
    """
    environment = {
        "CMAKE_ARGS": build.cmake_args,
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
        or str(os.cpu_count() or 1),
        # These pin the tools of the isolated build as well; pip 25.3 changed the name.
        "PIP_CONSTRAINT": str(CONSTRAINTS),
        "PIP_BUILD_CONSTRAINT": str(CONSTRAINTS),
    }
    remedy = (
        "if it ran out of memory, run again with CMAKE_BUILD_PARALLEL_LEVEL=1 in the environment"
        + (", or with QWQ_BACKEND=cpu" if build.backend != "cpu" else "")
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["wheel", "--verbose", "--no-cache-dir", "--no-deps", "--wheel-dir", folder]
        arguments += ["--no-binary", llama_wheel.PACKAGE, f"{llama_wheel.PACKAGE}=={build.version}"]
        run(pip(*arguments), progress, compile_note, environment=environment, remedy=remedy)
        return llama_wheel.keep_wheel(build, next(Path(folder).glob("*.whl")))


def install_torch(progress: Step) -> None:
    """Install torch: where no NVIDIA GPU is, a CPU build if any configured index offers one.

    On Linux the default build is the one for CUDA, several GB; a CPU build has `+cpu` in its
    version and comes from an index of its own, named by TORCH_INDEX or in pip's configuration.
    """
    version = pinned("torch")
    extra = ["--extra-index-url", index] if (index := os.environ.get("TORCH_INDEX")) else []
    remedy = "check the network and pip's settings, then run the same command again"
    if sys.platform == "linux" and not llama_wheel.has_nvidia_gpu():
        command = pip("install", *extra, "--constraint", str(CONSTRAINTS), f"torch=={version}+cpu")
        try:
            run(command, progress, pip_note, remedy=remedy)
        except SetupError as error:
            if "No matching distribution" not in str(error):
                raise
            print(
                "\nsetup: no CPU build of torch on offer, taking the default one, several GB;"
                " to avoid that, stop, and name PyTorch's CPU index: make setup TORCH_INDEX=..."
            )
        else:
            return
    command = pip("install", *extra, "--constraint", str(CONSTRAINTS), f"torch=={version}")
    run(command, progress, pip_note, remedy=remedy)


def install_rest(progress: Step) -> None:
    """Install the project itself, editable, with everything that is still missing."""
    arguments = ("install", "--constraint", str(CONSTRAINTS), "--editable", f".[{EXTRAS}]")
    remedy = "check the network and pip's settings, then run the same command again"
    run(pip(*arguments), progress, pip_note, remedy=remedy)


def main() -> int:
    """Install everything; return the exit status."""
    started_s = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_bytes(b"")
    try:
        build = llama_wheel.plan_build(pinned(llama_wheel.PACKAGE))
        with step(1, "environment .venv") as progress:
            make_environment(progress)
        how = "kept wheel" if llama_wheel.cached_wheel(build) else "compiling, some minutes"
        with step(
            2, f"{llama_wheel.PACKAGE} {build.version} for {build.backend}, {how}"
        ) as progress:
            install_llama(build, progress)
        with step(3, f"torch {pinned('torch')}") as progress:
            install_torch(progress)
        with step(4, "everything else") as progress:
            install_rest(progress)
    except (SetupError, ValueError) as error:
        print(f"\n{error}")
        return 1
    print(f"setup: done in {time.monotonic() - started_s:.0f} s; log: {LOG.relative_to(ROOT)}")
    return 0
