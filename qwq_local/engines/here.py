"""The engine for a path, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwq_local.engine import EngineSettings, OnProgress
from qwq_local.memory_plan import MemoryPlan, best_plan

if TYPE_CHECKING:
    from qwq_local.engines.gguf import GgufEngine
    from qwq_local.engines.transformers import TransformersEngine


def open_here(
    path: Path, settings: EngineSettings, *, on_progress: OnProgress | None = None
) -> GgufEngine | TransformersEngine:
    """Load a GGUF file, or a checkpoint's folder. Raises QwqError where that cannot be."""
    if path.is_dir():
        from qwq_local.engines.transformers import TransformersEngine

        return TransformersEngine(path, settings, on_progress=on_progress)
    from convert.gguf_header import read_header

    if settings.parallel > 1:
        from qwq_local.engines.batched import BatchedEngine

        return BatchedEngine(path, read_header(path), settings, on_progress=on_progress)
    from qwq_local.engines.gguf import GgufEngine

    return GgufEngine(path, read_header(path), settings, on_progress=on_progress)


def plan_here(path: Path, settings: EngineSettings) -> tuple[MemoryPlan, list[MemoryPlan]]:
    """How the path would be loaded, and all the ways among which that was chosen.

    Raises QwqError where it holds no model, or where what would run it is missing.
    """
    if path.is_dir():
        from qwq_local.engines.folder import (
            find_torch_device,
            import_torch,
            plan_folder,
            read_folder,
        )

        folder = read_folder(path)
        plan = plan_folder(folder, settings, find_torch_device(import_torch(path)))
        return plan, [plan]
    from convert.gguf_header import read_header
    from qwq_local.engines.gguf import KV_TYPES, plan_gguf

    header = read_header(path)
    plans: list[MemoryPlan] = [
        plan_gguf(path, header, settings, kv_type=kv_type) for kv_type in KV_TYPES
    ]
    return best_plan(plans), plans
