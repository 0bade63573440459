"""The engine for a path, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwq_local.engine import EngineSettings, OnProgress

if TYPE_CHECKING:
    from qwq_local.engines.gguf import GgufEngine
    from qwq_local.engines.transformers import TransformersEngine


def open_here(
    path: Path, settings: EngineSettings, *, on_progress: OnProgress | None = None
) -> GgufEngine | TransformersEngine:
    """Load a GGUF file, or a checkpoint's folder. Raises QwqError where that cannot be."""
    if path.is_dir():
        from qwq_local.engines.transformers import TransformersEngine

        return TransformersEngine(path, settings)
    from convert.gguf_header import read_header

    if settings.parallel > 1:
        from qwq_local.engines.batched import BatchedEngine

        return BatchedEngine(path, read_header(path), settings, on_progress=on_progress)
    from qwq_local.engines.gguf import GgufEngine

    return GgufEngine(path, read_header(path), settings, on_progress=on_progress)
