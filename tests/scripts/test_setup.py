"""Set-up says what is missing before it works, keeps wheels apart, and explains a failure."""

import ast
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import install
import llama_wheel
import pytest
import setup


@pytest.fixture
def build() -> llama_wheel.Build:
    flags = ("-march=native", *llama_wheel.OTHER_FLAGS)
    return llama_wheel.Build("0.3.36", "cpu", flags, "Linux x86_64 __AVX2__ 1")


def test_an_old_python_gets_advice_for_four_systems(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    monkeypatch.setattr(setup, "newer_python", lambda: None)
    assert setup.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("setup: needs Python 3.11 or newer, and this is 3.")
    assert [line.split("  ")[1] for line in lines[1:]] == list(setup.SYSTEMS)


def test_a_missing_compiler_is_named_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert setup.main() == 1
    output = capsys.readouterr().out
    assert output.startswith("setup: needs a C++17 compiler;")
    assert "build-essential" in output


def test_a_compiler_that_fails_counts_as_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert setup.missing() == [setup.COMPILER]


def test_setup_parses_under_python_3_6() -> None:
    source = Path(setup.__file__).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))


def test_a_wheel_is_kept_for_one_build_alone(build: llama_wheel.Build) -> None:
    others = (
        replace(build, version="0.3.37"),
        replace(build, backend="cuda"),
        replace(build, compiler_flags=("-march=native",)),
        replace(build, machine="Linux x86_64 __AVX512F__ 1"),
    )
    assert len({build.key, *(other.key for other in others)}) == 5
    assert build.key == replace(build).key


def test_contraction_and_amx_are_off_in_both_languages(build: llama_wheel.Build) -> None:
    flags = "-march=native -ffp-contract=off -U__AMX_INT8__"
    for language in ("C", "CXX"):
        assert f"'-DCMAKE_{language}_FLAGS={flags}'" in build.cmake_args


def test_what_is_installed_has_no_amx() -> None:
    import llama_cpp

    assert b"AMX_INT8" not in llama_cpp.llama_print_system_info()


def test_a_kept_wheel_is_found_again(
    build: llama_wheel.Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "llama_cpp_python-0.3.36-py3-none-linux_x86_64.whl"
    made.write_bytes(b"wheel")
    assert llama_wheel.cached_wheel(build) is None
    kept = llama_wheel.keep_wheel(build, made)
    assert llama_wheel.cached_wheel(build) == kept
    assert kept.is_relative_to(tmp_path / "cache" / "qwq-local" / "wheels" / build.key)
    assert llama_wheel.cached_wheel(replace(build, machine="another")) is None


def test_a_toolkit_without_a_gpu_is_no_reason_for_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n", encoding="utf-8")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("QWQ_BACKEND", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert llama_wheel.chosen_backend() == "cpu"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: a card (UUID: none)'\n", encoding="utf-8")
    smi.chmod(0o755)
    assert llama_wheel.chosen_backend() == "cuda"
    monkeypatch.setenv("QWQ_BACKEND", "abacus")
    with pytest.raises(ValueError, match="abacus is none of cpu, cuda, metal"):
        llama_wheel.chosen_backend()


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (b"  [57/193] Building CXX object common.cpp.o\n", "compiling 57 of 193"),
        (b"  -- Configuring done (1.0s)\n", None),
    ],
)
def test_progress_is_read_from_the_compiler(line: bytes, note: str | None) -> None:
    assert install.compile_note(line) == note


@pytest.mark.parametrize(
    ("line", "note"),
    [
        (b"Collecting numpy==2.2.6\n", "collecting numpy==2.2.6"),
        (b"  Downloading numpy-2.2.6.whl (16.8 MB)\n", "downloading numpy-2.2.6.whl"),
        (b"Installing collected packages: a, b\n", "installing collected packages:"),
        (b"something else\n", None),
    ],
)
def test_progress_is_read_from_pip(line: bytes, note: str | None) -> None:
    assert install.pip_note(line) == note


def test_a_failed_step_shows_its_end_the_remedy_and_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "LOG", tmp_path / "setup.log")
    script = "for i in range(40): print('line', i)\nraise SystemExit(1)"
    with (
        pytest.raises(install.SetupError) as caught,
        install.step(2, "a package") as progress,
    ):
        install.run([sys.executable, "-c", script], progress, install.pip_note, remedy="do this")
    message = str(caught.value)
    assert message.startswith("line 10\n")
    assert "line 39\n\nsetup: a package failed; do this; all output: " in message
    assert (tmp_path / "setup.log").read_text(encoding="utf-8").count("line") == 40 + 1


def test_setup_installs_every_extra_at_a_pinned_version() -> None:
    """Catches an extra that was renamed: pip only warns, and what it brings is not there."""
    project = tomllib.loads((install.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert sorted(install.EXTRAS.split(",")) == sorted(extras)
    wanted = [line for lines in (project["dependencies"], *extras.values()) for line in lines]
    pinned = re.findall(r"^([\w-]+)==", install.CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    assert {re.split(r"[^\w-]", line)[0].lower() for line in wanted} <= set(pinned)
