"""What a model takes of each device, held against what is free, before it is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convert.errors import QwqError
from convert.files import format_nbytes
from qwq_local.engine import KvType

KV_NBYTES: dict[KvType, float] = {"f16": 2, "q8_0": 34 / 32}
GPU_RESERVE_NBYTES = 512 << 20
"""Left free on each GPU: the driver's own and what other programs come to need."""
_GPU_DEVICES = (1, 2)  # ggml_backend_dev_type


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The numbers that memory follows from. n_kv_values: keys and values of a layer and token."""

    weights_nbytes: int
    n_layers: int
    n_kv_values: int
    embedding_length: int
    feed_forward_length: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Device:
    """free_nbytes: what a model may still take."""

    name: str
    is_gpu: bool
    free_nbytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one device holds, in bytes."""

    device: Device
    weights_nbytes: int
    kv_nbytes: int
    compute_nbytes: int

    @property
    def nbytes(self) -> int:
        return self.weights_nbytes + self.kv_nbytes + self.compute_nbytes

    @property
    def fits(self) -> bool:
        return self.nbytes <= self.device.free_nbytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a model is loaded.

    kv_type: what the kv_cache is stored in. n_gpu_layers counts the output matrix as a layer, as
    llama.cpp does.
    """

    context: int
    kv_type: str
    batch: int
    n_gpu_layers: int
    shares: tuple[Share, ...]

    @property
    def is_on_gpu(self) -> bool:
        """Whether all layers are."""
        return not any(share.weights_nbytes for share in self.shares if not share.device.is_gpu)

    @property
    def fits(self) -> bool:
        return all(share.fits for share in self.shares)


@dataclass(frozen=True, slots=True)
class GgufPlan(MemoryPlan):
    """A plan for llama.cpp, where the kv_cache's type can be chosen."""

    kv_type: KvType


AnyPlan = TypeVar("AnyPlan", bound=MemoryPlan)


def best_plan(plans: Sequence[AnyPlan]) -> AnyPlan:
    """That it fits goes before the longest context, and that before all layers on GPUs.

    Of equal ones the first.
    """
    return max(plans, key=lambda plan: (plan.fits, plan.context, plan.is_on_gpu))


def plan_memory(
    sizes: ModelSizes,
    devices: Sequence[Device],
    *,
    context: int,
    kv_type: KvType,
    batch: int,
    n_logits_rows: int,
    n_sequences: int = 1,
) -> GgufPlan:
    """As many layers on the GPUs as their free memory holds, the rest beside the processor.

    n_sequences: so many conversations have a context each. Weights count as spread evenly over the
    layers. Compute buffers are estimated from above: a batch's activations, the logits' rows, and
    the mask of attention; beside the processor the rows that llama.cpp hands out and a copy too.
    """
    n_positions = n_sequences * context
    kv_nbytes = round(n_positions * sizes.n_layers * sizes.n_kv_values * KV_NBYTES[kv_type])
    n_activations = 2 * sizes.feed_forward_length + 4 * sizes.embedding_length
    compute_nbytes = 4 * (batch * n_activations + n_logits_rows * sizes.vocab_size)
    compute_nbytes += 2 * batch * n_positions
    n_units = sizes.n_layers + 1
    unit_nbytes = (sizes.weights_nbytes + kv_nbytes) / n_units
    shares, n_left = [], n_units
    for device in (device for device in devices if device.is_gpu):
        room = device.free_nbytes - GPU_RESERVE_NBYTES - compute_nbytes
        n_here = max(0, min(n_left, int(room / unit_nbytes)))
        if n_here:
            shares.append(_share(device, n_here / n_units, sizes, kv_nbytes, compute_nbytes))
            n_left -= n_here
    n_gpu_layers = n_units - n_left
    compute_nbytes += 2 * 4 * n_logits_rows * sizes.vocab_size
    for device in (device for device in devices if not device.is_gpu):
        shares.append(_share(device, n_left / n_units, sizes, kv_nbytes, compute_nbytes))
    return GgufPlan(context, kv_type, batch, n_gpu_layers, tuple(shares))


def check_fits(plan: MemoryPlan, alternatives: Iterable[MemoryPlan], path: Path) -> None:
    """Raises QwqError where the plan does not fit, with the first alternative that does."""
    if plan.fits:
        return
    tight = next(share for share in plan.shares if not share.fits)
    match next((other for other in alternatives if other.fits), None):
        case GgufPlan() as fitting:
            advice = f"--context {fitting.context} --kv-type {fitting.kv_type} would fit"
        case MemoryPlan() as fitting:
            advice = f"--context {fitting.context} would fit"
        case None if isinstance(plan, GgufPlan):
            advice = "choose a smaller type of file"
        case None:
            advice = "choose a GGUF file of it, which takes less"
    raise QwqError(
        f"{path}: with a context of {plan.context:,} tokens it takes "
        f"{format_nbytes(tight.nbytes)} of {tight.device.name}, where "
        f"{format_nbytes(tight.device.free_nbytes)} are free; {advice}"
    )


def find_devices(llama: Any) -> tuple[Device, ...]:
    """The processor's memory, and each GPU that this build of llama.cpp can use."""
    library = llama._lib
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_name.restype = ctypes.c_char_p
    devices = []
    for index in range(library.ggml_backend_dev_count()):
        handle = ctypes.c_void_p(library.ggml_backend_dev_get(ctypes.c_size_t(index)))
        if library.ggml_backend_dev_type(handle) in _GPU_DEVICES:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            library.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
            name = library.ggml_backend_dev_name(handle).decode()
            devices.append(Device(name, True, free.value))
    return (*devices, find_memory())


def find_memory() -> Device:
    """The processor's memory."""
    import psutil

    free_nbytes = min(psutil.virtual_memory().available, _free_in_container())
    return Device("memory", False, free_nbytes)


def find_nvidia_gpus() -> tuple[Device, ...]:
    """What NVIDIA's driver knows of, where nvidia-ml-py is installed to ask it."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()  # there is no driver
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return tuple(
            Device(
                str(pynvml.nvmlDeviceGetName(handle)),
                True,
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            )
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()


def _free_in_container() -> int:
    """What a container's limit leaves, 2**63 where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or not used.exists():
        return 1 << 63
    text = limit.read_text().strip()
    if not text.isdigit():
        return 1 << 63
    cache = 0
    for line in (folder / "memory.stat").read_text().splitlines():
        if line.startswith(("inactive_file ", "active_file ")):
            cache += int(line.split()[1])  # given back when it is needed
    return max(0, int(text) - int(used.read_text()) + cache)


def _share(
    device: Device, part: float, sizes: ModelSizes, kv_nbytes: int, compute_nbytes: int
) -> Share:
    return Share(
        device, round(part * sizes.weights_nbytes), round(part * kv_nbytes), compute_nbytes
    )
