"""A device that is not here, pretended: tensors that say they lie on it and are computed here.

It shows what goes wrong on a real one before any arithmetic does: a tensor left behind on the
processor, one handed to numpy, and float64 where MPS has none. Rounding, kernels and memory are the
processor's, so it proves nothing of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

BACKENDS = {"cpu": torch.cpu, "cuda": torch.cuda, "mps": torch.backends.mps}
FACTORIES = ("arange", "empty", "eye", "full", "ones", "rand", "randn", "tensor", "zeros")
MOVES = ("copy_", "__setitem__")  # between devices
TAKES_INDICES = ("__getitem__", "index_put_")  # from the processor too


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a device; what it holds is `held`, on the processor."""

    held: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> Elsewhere:
        if place.type == "mps" and held.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=place
        )
        made.held, made.place = held, place
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return args[0].place
        if name in ("numpy", "__array__"):
            raise TypeError(f"{args[0].place}: not the processor's memory; use Tensor.cpu()")
        if name == "register_hook":
            (this, hook), place = args, args[0].place
            return this.held.register_hook(lambda grad: _held(hook(cls(grad, place))))
        if name == "_has_compatible_shallow_copy_type":  # whether a module may keep its parameter
            return False
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        _check_places(name, given)
        ours = {id(one.held): one for one in given if isinstance(one, cls)}
        place = next(iter(ours.values())).place
        if "device" in kwargs:
            place, kwargs["device"] = torch.device(kwargs["device"] or place), "cpu"
        if name == "cpu":
            place = torch.device("cpu")

        def put(found: Any) -> Any:
            if not isinstance(found, torch.Tensor) or isinstance(found, cls):
                return found
            if place.type == "cpu":
                return found.clone()
            if id(found) in ours:
                return ours[id(found)]
            return found if any(found is one for one in given) else cls(found, place)

        return tree_map(put, func(*_held(args), **_held(kwargs)))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func}: not pretended")


def _held(values: Any) -> Any:
    return tree_map(lambda one: one.held if isinstance(one, Elsewhere) else one, values)


def _check_places(name: str, given: list[torch.Tensor]) -> None:
    """As devices do: numbers without a shape may come from the processor, other tensors not."""
    if name in MOVES:
        return
    tensors = [one for one in given if _held(one).ndim]
    if name in TAKES_INDICES:
        tensors = [one for one in tensors if one is given[0] or isinstance(one, Elsewhere)]
    if len({isinstance(one, Elsewhere) for one in tensors}) > 1:
        shapes = ", ".join(f"{type(one).__name__}{[*_held(one).shape]}" for one in tensors)
        raise RuntimeError(f"{name}: tensors on different devices: {shapes}")


def real_or_pretended(name: str) -> AbstractContextManager[None]:
    """What a test of a kind of device runs in: nothing where there is one."""
    return nullcontext() if BACKENDS[name].is_available() else pretended(name)


@contextmanager
def pretended(name: str) -> Iterator[None]:
    """Let tensors be made on and moved to a device that is not here, from any thread."""
    place = torch.device(name)
    move = torch.Tensor.to

    def made(make: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.device(kwargs.get("device") or "cpu").type != place.type:
            return make(*args, **kwargs)
        return Elsewhere(make(*args, **(kwargs | {"device": "cpu"})), place)

    def moved(this: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked = [one for one in (*args, *kwargs.values()) if one is not None]
        likes = [one for one in asked if isinstance(one, torch.Tensor)]
        dtypes = [one for one in asked if isinstance(one, torch.dtype)] + [x.dtype for x in likes]
        places = [torch.device(x) for x in asked if isinstance(x, str | torch.device)]
        places += [one.device for one in likes]
        if dtypes and dtypes[0] != this.dtype:
            this = this.type(dtypes[0])
        if not places or places[0].type == this.device.type:
            return this
        if places[0].type == place.type:
            return Elsewhere(this.clone(), place)
        held = this.held.clone() if isinstance(this, Elsewhere) else this
        return move(held, places[0])

    with pytest.MonkeyPatch.context() as patch:
        for factory in FACTORIES:
            patch.setattr(torch, factory, partial(made, getattr(torch, factory)))
        patch.setattr(torch.Tensor, "to", moved)
        patch.setattr(BACKENDS[name], "is_available", lambda: True)
        yield
