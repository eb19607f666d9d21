"""A pretended CUDA device: tensors that say `cuda:0` and hold CPU values, with every wait logged.

On a GPU the host waits for the stream in two cases, and each is one record in the log:

    read     the host reads a value: tolist, item, cpu, bool, nonzero, a size that is data
    upload   memory of the host that is not pinned is copied to the device
    draw     random numbers come from a generator that is given, of which a captured graph knows
             nothing; it does not wait

Copies from and to pinned memory do not wait if they are asked not to. `Log.done` says whether what
the device was given is done, which events are asked.

The real layer runs on these tensors, forward and backward, in one process and on gloo ranks. What
a kernel does on a GPU is not seen here; what the host does is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

import spmd_moe

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_PACKAGE = str(Path(spmd_moe.__file__).parent)
# Methods that read values on the host without an operator that a dispatch mode sees.
_READING_METHODS = [
    "tolist",
    "item",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
]
_READING_OPERATORS = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
    ]
)
_ANSWERS = {"device": CUDA, "is_cpu": False, "is_cuda": True, "is_meta": False}


@dataclass(frozen=True)
class Wait:
    """One wait of the host: `read` or `upload`, the operation, and the line of the package."""

    kind: str
    operation: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind} by {self.operation} at {self.line}"


@dataclass
class Log:
    """What ran while the device was pretended."""

    waits: list[Wait] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    done: bool = True
    capturing: bool = False

    def take(self) -> list[str]:
        """The waits since the last call, in words."""
        found, self.waits = [str(wait) for wait in self.waits], []
        return found


class OnDevice(Tensor):
    """A tensor that says it is on `cuda:0`; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("meta"),
        )
        made.held = held
        return made

    # Asked inside autograd functions, where torch does not call `__torch_function__`.
    device = property(lambda self: CUDA)
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            asked = getattr(getattr(func, "__self__", None), "__name__", "")
            if asked in _ANSWERS:
                return _ANSWERS[asked]
        # Not torch's own, which makes a copy on the CPU one of this class again.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch leaves it untyped
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


def _reading(name: str) -> Callable[..., Any]:
    """A method that reads. Not by `__torch_function__`, which torch skips within backward."""

    def read(self: OnDevice, *args: Any, **kwargs: Any) -> Any:
        _note("read", name)
        return getattr(values(self).clone(), name)(*args, **kwargs)

    return read


for _name in _READING_METHODS:
    setattr(OnDevice, _name, _reading(_name))


class _Mode(TorchDispatchMode):
    """Sees what has no tensor of the device among its arguments, such as `torch.zeros(device=)`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _Event:
    """An event of the stream."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return _LOG.done

    def synchronize(self) -> None:
        _note("read", "synchronize")


_LOG = Log()


@contextmanager
def pretended_device(capability: tuple[int, int] = (9, 0)) -> Iterator[Log]:
    """`cuda:0` exists in this block, with this compute capability; yields the log."""
    global _LOG
    before, _LOG = _LOG, Log()
    try:
        with ExitStack() as patches:
            for name, value in (
                ("_lazy_init", lambda: None),
                ("current_device", lambda: 0),
                ("get_device_capability", lambda device=None: capability),
                ("is_current_stream_capturing", lambda: _LOG.capturing),
                ("synchronize", lambda device=None: _note("read", "synchronize")),
                ("Event", _Event),
                ("get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8)),
                ("set_rng_state", lambda state, device=None: None),
            ):
                patches.enter_context(mock.patch.object(torch.cuda, name, value))
            patches.enter_context(_Mode())  # type: ignore[no-untyped-call]  # torch
            yield _LOG
    finally:
        _LOG = before


def on_device(x: Tensor, *, requires_grad: bool = False) -> OnDevice:
    """A copy of `x` on the device. Not logged: it is the caller's own upload."""
    return cast(OnDevice, OnDevice(x.detach().clone()).requires_grad_(requires_grad))


def to_device(module: nn.Module) -> None:
    """Put the parameters and buffers of a module on the device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = on_device(parameter, requires_grad=parameter.requires_grad)
                vars(moved)["_is_param"] = True  # what makes it an nn.Parameter
                part._parameters[name] = cast(nn.Parameter, moved)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = on_device(buffer)


def values(x: Tensor) -> Tensor:
    """The values of a tensor on the device; read by the test, so not logged."""
    with torch._C.DisableTorchFunctionSubclass():
        return _held(x.detach())


def _held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, OnDevice) else x


def _note(kind: str, operation: str) -> None:
    frame: Any = sys._getframe(1)
    while frame is not None and not _is_in_package(frame.f_code.co_filename):
        frame = frame.f_back
    line = "the caller"
    if frame is not None:
        line = f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno}"
    _LOG.waits.append(Wait(kind, operation, line))


def _is_in_package(filename: str) -> bool:
    """In the package, and not in the helper through which it reads: its caller is the place."""
    return filename.startswith(_PACKAGE) and not filename.endswith("host_values.py")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, log what would wait, and put the result where it belongs."""
    name = func.name().removeprefix("aten::")
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device).type
    here = any(isinstance(t, OnDevice) for t in tensors)
    there = asked in ("cuda", "meta")
    if not here and not there:
        pinned = kwargs.pop("pin_memory", None)  # a CPU alone has no such memory
        result = func(*args, **kwargs)
        if pinned:
            vars(result)["pinned"] = True
        return result
    _LOG.operators.append(name)
    _note_waits(name, args, kwargs, here=here, asked=asked)
    if there:
        kwargs["device"] = CPU
    own = {id(_held(t)): t for t in tensors}
    result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
    if asked == "cpu" and "_to_copy" in name:
        return result
    # What an operator hands back as it was given (in place) stays the same object.
    return tree_map_only(Tensor, lambda t: own[id(t)] if id(t) in own else OnDevice(t), result)


def _plain(value: object) -> object:
    if isinstance(value, OnDevice):
        return value.held
    if isinstance(value, torch.device) and value.type in ("cuda", "meta"):
        return CPU
    return value


def _note_waits(
    name: str, args: Any, kwargs: Mapping[str, Any], *, here: bool, asked: str | None
) -> None:
    sized_by_data = name == "repeat_interleave.Tensor" and kwargs.get("output_size") is None
    if sized_by_data or name.partition(".")[0] in _READING_OPERATORS:
        _note("read", name)
    elif kwargs.get("generator") is not None:
        _note("draw", name)
    elif name.startswith("_to_copy"):
        if asked in ("cuda", "meta") and not here:
            _note("upload", name)
        elif asked == "cpu":
            _note("read", name)
    elif name.startswith("copy_"):
        target, source = (isinstance(t, OnDevice) for t in args[:2])
        pinned = any(hasattr(t, "pinned") for t in args[:2])
        blocks = not (pinned and (kwargs.get("non_blocking") or args[2:] == (True,)))
        if target != source and blocks and (source or args[1].ndim):
            _note("upload" if target else "read", name)
