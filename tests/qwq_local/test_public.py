"""What an application may import."""

import inspect
import subprocess
import sys

import qwq_local


def test_the_public_names() -> None:
    """Would catch a name that comes or goes unnoticed."""
    assert qwq_local.__all__ == [
        "Answer",
        "AsyncStream",
        "ContextError",
        "Done",
        "EngineError",
        "Limits",
        "Notice",
        "QwQ",
        "QwqError",
        "Reasoning",
        "Reply",
        "Sampling",
        "Session",
        "Stream",
        "Timings",
        "ToolCall",
        "Usage",
        "UsageError",
    ]
    assert qwq_local.__all__ == sorted(qwq_local.__all__)
    for name in qwq_local.__all__:
        assert inspect.getdoc(getattr(qwq_local, name)), name


def test_nothing_heavy_is_imported() -> None:
    """Would catch an import that makes `qwq --help` slow."""
    program = (
        "import sys, qwq_local.cli, qwq_local; "
        "print({'numpy', 'torch', 'transformers', 'llama_cpp', 'jinja2', 'gguf', 'psutil', "
        "'pydantic', 'qwq_local.model'} & {*sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "set()"
