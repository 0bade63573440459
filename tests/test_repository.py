"""What must hold of the repository as a whole: import direction, versions, pins, clean files."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from importlinter import cli as import_linter

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = re.compile(r"[A-Za-z0-9._-]+")
# An absolute path below a user's or a machine's own folders, or the address of a package index.
MACHINE_PATH = re.compile(r"(?<![\w.{}$~/-])/(?:home|root|Users|work|mnt|srv)/[\w.-]+")
INDEX_ADDRESS = re.compile(
    r"https?://\S*(?:/simple\b|pythonhosted|pypi\.org|download\.pytorch)", re.IGNORECASE
)


def tracked_texts() -> list[tuple[Path, str]]:
    """Return every tracked text file with its content."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    texts = []
    for name in filter(None, listed.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in content:
            texts.append((Path(name), content.decode()))
    return texts


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("==") for line in lines if not line.startswith("#"))
    return {name: pin for name, _, pin in pairs}


def test_imports_point_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert import_linter.lint_imports(no_cache=True) == import_linter.EXIT_STATUS_SUCCESS


def test_the_installed_version_is_the_projects() -> None:
    assert version("qwq-local") == PROJECT["version"]
    headings = re.findall(
        r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert headings[0] == PROJECT["version"]


def test_every_requirement_is_pinned_and_installed_as_pinned() -> None:
    pinned = pins()
    for requirement in requires("qwq-local") or []:
        found = NAME.match(requirement)
        assert found is not None
        name = canonical(found[0])
        pin = pinned[name].partition(";")[0]
        assert version(name).partition("+")[0] == pin or name == "numpy", name


def test_every_requirement_has_its_reason_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (one for group in groups for one in group):
        assert re.search(rf'^ *"{re.escape(requirement)}", +# \S+', text, re.MULTILINE), requirement


def test_the_base_install_has_no_torch() -> None:
    names = {canonical(NAME.match(one)[0]) for one in PROJECT["dependencies"]}  # type: ignore[index]
    assert names.isdisjoint({"torch", "transformers", "gptqmodel", "accelerate", "optimum"})


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    script = (
        "import sys, qwq_local, qwq_local.cli\n"
        "heavy = {'torch', 'transformers', 'llama_cpp', 'gptqmodel', 'matplotlib', 'quant_eval'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_file_names_a_machines_path_or_an_index() -> None:
    for name, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), 1):
            for pattern in (MACHINE_PATH, INDEX_ADDRESS):
                found = pattern.search(line)
                assert not found or name == Path("tests/test_repository.py"), (
                    f"{name}:{number}: {found[0]}"
                )


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    for target in phony[1].split():
        assert re.search(rf"^{target}:.* ## \S+", text, re.MULTILINE), target
    help_text = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(f"make {target}" in help_text for target in phony[1].split())
