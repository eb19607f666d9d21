"""Names of torch functions as mypy gives them: `torch._C._nn.gelu` is `F.gelu`."""

from __future__ import annotations

from collections.abc import Callable

# Modules that have no placements, and whose files are many.
_FOREIGN = (
    "builtins.",
    "typing.",
    "typing_extensions.",
    "torch.",
    "_typeshed.",
    "collections.",
    "mypy.",
    "numpy.",
)

_FUNCTIONS = {
    "torch._C._VariableFunctions": "torch",
    "torch.functional": "torch",
    "torch._C._nn": "F",
    "torch.nn.functional": "F",
    "torch._C._special": "special",
    "torch.special": "special",
    "torch._C._linalg": "linalg",
    "torch.linalg": "linalg",
}


def is_foreign(fullname: str) -> bool:
    return fullname.startswith(_FOREIGN)


def function_operation(fullname: str) -> str | None:
    """The operation that a function of torch is; None for every other function."""
    if fullname == "builtins.abs":
        return "Tensor.abs"
    if not fullname.startswith("torch."):
        return None
    module, _, name = fullname.rpartition(".")
    prefix = _FUNCTIONS.get(module)
    return None if prefix is None else f"{prefix}.{name}"


def method_operation(fullname: str, is_tensor: Callable[[str], bool]) -> str | None:
    """The operation that a method or attribute of a tensor is, on any subclass."""
    owner, _, name = fullname.rpartition(".")
    if owner.startswith(("builtins.", "typing.")) or name in _NO_OPERATION or not is_tensor(owner):
        return None
    return "Tensor.unbind" if name == "__iter__" else f"Tensor.{name}"


_NO_OPERATION = frozenset({"__init__", "__new__", "__class__", "__call__"})
