"""Replacements for what a CPU lacks, or what float64 needs: installed for a run, then taken away.

Dropout is always off. The others are asked for by name, by a target or an adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from spmd_moe.check.target import cannot

LOW = (torch.float32, torch.bfloat16, torch.float16)
Patches = Iterator[tuple[object, str, Any]]


def _dropout() -> Patches:
    def whole(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        return input

    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"):
        yield functional, name, whole


def _float64() -> Patches:
    """Casts to lower precisions leave float64 as it is, and autocast does nothing."""
    to, to_float = Tensor.to, Tensor.float

    def stays(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else to(self, *args, **kwargs)

    def wide(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs).double()

    def converted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if a in LOW else a for a in map(_dtype, args))
            if kwargs.get("dtype") in LOW:
                kwargs["dtype"] = torch.float64
        return to(self, *args, **kwargs)

    for name in ("bfloat16", "half"):
        yield Tensor, name, stays
    yield Tensor, "float", wide
    yield Tensor, "to", converted
    yield torch, "autocast", _NoCast
    yield torch.amp, "autocast", _NoCast


def _dtype(arg: Any) -> Any:
    """Of a tensor that is given in place of a dtype, its dtype: `x.to(y)`."""
    return arg.dtype if isinstance(arg, Tensor) and arg.dtype in LOW else arg


class _NoCast(contextlib.ContextDecorator):
    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> _NoCast:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _histc() -> Patches:
    """torch counts integers on GPUs only."""
    histc = torch.histc

    def counted(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.is_floating_point():
            return histc(input, *args, **kwargs)
        return histc(input.double(), *args, **kwargs).to(input.dtype)

    yield torch, "histc", counted


def _grouped_mm() -> Patches:
    """torch has no grouped matmul of float64."""

    def grouped(x: Tensor, w: Tensor, offs: Tensor | None = None, **kwargs: object) -> Tensor:
        if offs is None:
            return x @ w
        pieces, begin = [], 0
        for expert, end in enumerate(offs.tolist()):
            pieces.append(x[begin:end] @ w[expert])
            begin = end
        pieces.append(x.new_zeros(x.shape[0] - begin, w.shape[-1]))
        return torch.cat(pieces)

    yield functional, "grouped_mm", grouped
    if hasattr(torch, "_grouped_mm"):
        yield torch, "_grouped_mm", grouped


def _cuda() -> Patches:
    """Code that asks for the current device and its streams gets the CPU."""

    def device() -> torch.device:
        return torch.device("cpu")

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    yield torch.cuda, "current_device", device
    yield torch.cuda, "synchronize", nothing
    yield torch.cuda, "current_stream", lambda *a: _Stream()
    yield torch.cuda, "default_stream", lambda *a: _Stream()
    yield torch.cuda, "Stream", lambda *a, **k: _Stream()
    yield torch.cuda, "stream", lambda *a: contextlib.nullcontext()
    yield Tensor, "cuda", lambda self, *a, **k: self


class _Stream:
    """Also an event: what a method of a stream returns has methods again."""

    def __getattr__(self, name: str) -> Callable[..., _Stream]:
        return lambda *args, **kwargs: self


STAND_INS: dict[str, tuple[Callable[[], Patches], str]] = {
    "dropout": (_dropout, "dropout is off"),
    "float64": (_float64, "casts to bfloat16 and float32, and autocast, leave float64 as it is"),
    "histc": (_histc, "torch.histc counts integers"),
    "grouped_mm": (_grouped_mm, "grouped_mm is a loop over the groups"),
    "cuda": (_cuda, "torch.cuda devices and streams are the CPU"),
}


@contextlib.contextmanager
def installed(
    names: Sequence[str], patches: Sequence[tuple[object, str, Any]] = ()
) -> Iterator[None]:
    """In place inside the block; what was there before is there after it.

    `patches` are an adapter's own: object, attribute and value.
    """
    for name in names:
        if name not in STAND_INS:
            have = f"there are {', '.join(STAND_INS)}"
            raise cannot("parity", f"there is no stand-in {name!r}", have, "stand_ins=('histc',)")
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            for owner, attribute, value in STAND_INS[name][0]():
                stack.enter_context(mock.patch.object(owner, attribute, value))
        for owner, attribute, value in patches:  # some are of names that an import left undefined
            stack.enter_context(mock.patch.object(owner, attribute, value, create=True))
        yield
