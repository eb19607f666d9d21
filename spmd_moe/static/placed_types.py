"""Kinds in mypy's types: stored, found and compared.

A placed tensor is mypy's type of the tensor with a note attached, in the slot where mypy keeps what
it knows of one object beyond its class. Notes do not take part in subtyping, so a placed tensor and
one of which nothing is known go wherever the other does, and all comparing is done here.
"""

from __future__ import annotations

from collections.abc import Iterator
from sys import getrefcount

from mypy.maptype import map_instance_to_supertype
from mypy.nodes import Decorator, FuncDef, OverloadedFuncDef, TypeInfo, Var
from mypy.types import (
    AnyType,
    CallableType,
    ExtraAttrs,
    Instance,
    NoneType,
    ProperType,
    TupleType,
    Type,
    UnionType,
    flatten_nested_unions,
    get_proper_type,
)

from spmd_moe.static.kinds import Kinds, read, write

DEPTH = 3  # how far a type is looked into: types may be recursive
TENSOR = "torch._C.TensorBase"
_PLACED, _ROLE, _KIND = "placed ", "axis ", "kind "

# mypy erases notes in place where it merges an object's type with one that has another, or none.
# That is right for what an expression was found to be. What is declared must stay, so the notes of
# all types that were not made by a hook are kept here too, by the object itself.
_OWN_REFERENCES = 3  # an entry below, a variable, and the argument of the question
_declared: dict[int, tuple[Instance, str]] = {}
_found: dict[int, tuple[Instance, str]] = {}


def _note(t: Instance) -> str:
    known = _declared.get(id(t))
    if known is not None and known[0] is t:
        if t.extra_attrs is None:
            t.extra_attrs = ExtraAttrs({}, {known[1]})
        return known[1]
    if t.extra_attrs is None or len(t.extra_attrs.immutable) != 1:
        return ""
    (note,) = t.extra_attrs.immutable
    if not _was_found(t):
        _declared[id(t)] = t, note
    return note


def _with_note(t: Instance, note: str) -> Instance:
    new = t.copy_modified()
    # In the part of the slot by which mypy tells two types apart, so that it narrows by assignment.
    new.extra_attrs = ExtraAttrs({}, {note})
    _found[id(new)] = new, note
    return new


def _was_found(t: Instance) -> bool:
    return id(t) in _found and _found[id(t)][0] is t


def as_found(t: Type) -> Type:
    """The type of an expression as a hook found it, although mypy has merged it with another."""
    p = get_proper_type(t)
    if isinstance(p, Instance) and p.extra_attrs is None and _was_found(p):
        return _with_note(p, _found[id(p)][1])
    return t


def declare(t: Type) -> Type:
    """A type that was read in an annotation: its notes stay when mypy merges it with another."""
    for found in tensors_in(t):
        _found.pop(id(found), None)
        _note(found)
    return t


def declare_all_of(node: object) -> bool:
    """The same for what a name is declared to be, which may come from the cache.

    It tells whether there is a placement in that, or among the fields of a record.
    """
    if isinstance(node, TypeInfo):
        return _is_placed_record(node, 0)
    if isinstance(node, OverloadedFuncDef):
        return True in [declare_all_of(item) for item in node.items]
    node = node.func if isinstance(node, Decorator) else node
    t = get_proper_type(node.type) if isinstance(node, Var | FuncDef) and node.type else None
    parts = [*t.arg_types, t.ret_type] if isinstance(t, CallableType) else [t]
    return True in [placed_within(declare(part)) for part in parts if part is not None]


def restore_declared() -> None:
    """Notes that mypy has erased in what is declared: a daemon would take that for a change."""
    for t, note in list(_declared.values()):
        if t.extra_attrs is None:
            t.extra_attrs = ExtraAttrs({}, {note})


def forget_unused() -> None:
    """Release types that have no other reference, which a daemon would collect for days."""
    for kept in (_declared, _found):
        for key in [k for k, (t, _) in kept.items() if getrefcount(t) <= _OWN_REFERENCES]:
            del kept[key]


def signature_of(node: object) -> CallableType | None:
    """What a method is declared to be: as its decorators leave it; of a property, what it gives."""
    if isinstance(node, OverloadedFuncDef) and node.is_property:
        node = node.items[0]
    declared: FuncDef | Var | None = node if isinstance(node, FuncDef) else None
    if isinstance(node, Decorator):
        declared = node.var
    t = None if declared is None else get_proper_type(declared.type)
    return t if isinstance(t, CallableType) else None


def is_tensor_class(info: TypeInfo) -> bool:
    return any(base.fullname == TENSOR for base in info.mro)


def tensor(t: Type | None) -> Instance | None:
    """The tensor that a type is, or is unless it is None."""
    p = None if t is None else get_proper_type(t)
    if isinstance(p, UnionType):
        items = [i for i in map(get_proper_type, p.items) if not isinstance(i, NoneType)]
        found = [i for i in map(tensor, items) if i is not None]
        return found[0] if found and len(found) == len(items) else None
    return p if isinstance(p, Instance) and is_tensor_class(p.type) else None


def kinds_of(t: Type | None) -> Kinds | None:
    """What is known of a tensor's placement; None for what is no tensor, or one not placed."""
    found = tensor(t)
    note = _note(found) if found is not None else ""
    return (read(note.removeprefix(_PLACED)) or None) if note.startswith(_PLACED) else None


def each_kinds_of(t: Type | None) -> list[Kinds]:
    """The placements of a tensor that may be placed in one of several ways; {} if in any."""
    p = None if t is None else get_proper_type(t)
    items = flatten_nested_unions(p.items) if isinstance(p, UnionType) else [p]
    return [kinds_of(item) or {} for item in items if tensor(item) is not None]


def place(t: Type, kinds: Kinds, depth: int = 0) -> Type:
    """The type with a placement on each tensor in it: itself, or items of a tuple or list.

    Empty kinds say that nothing is known, also if mypy infers a type.
    """
    p = get_proper_type(t)
    if depth > DEPTH:
        return t
    if isinstance(p, Instance):
        if is_tensor_class(p.type):
            return _with_note(p, _PLACED + write(kinds))
        if p.args:
            return p.copy_modified(args=[place(a, kinds, depth + 1) for a in p.args])
    if isinstance(p, TupleType):
        return p.copy_modified(items=[place(i, kinds, depth + 1) for i in p.items])
    if isinstance(p, UnionType):
        return UnionType([place(i, kinds, depth + 1) for i in p.items], p.line, p.column)
    return t


def tensors_in(t: Type, depth: int = 0) -> Iterator[Instance]:
    """The tensors of an operand: itself, or the items of a tuple or list."""
    p = get_proper_type(t)
    found = tensor(p)
    if found is not None:
        yield found
    elif depth > DEPTH:
        return
    elif isinstance(p, TupleType | UnionType):
        for item in p.items:
            yield from tensors_in(item, depth + 1)
    elif isinstance(p, Instance) and p.type.fullname in SEQUENCES and p.args:
        yield from tensors_in(p.args[0], depth + 1)


def placed_within(t: Type, depth: int = 0) -> bool:
    """Whether there is a placement in a type, or in the fields of a record that it is."""
    p = get_proper_type(t)
    if depth > DEPTH:
        return False
    if isinstance(p, UnionType | TupleType):
        return any(placed_within(i, depth + 1) for i in p.items)
    if not isinstance(p, Instance):
        return False
    if kinds_of(p) is not None or any(placed_within(a, depth + 1) for a in p.args):
        return True
    return _is_placed_record(p.type, depth)


def _is_placed_record(info: TypeInfo, depth: int) -> bool:
    if "dataclass" not in info.metadata and info.tuple_type is None:
        return False
    fields = (s.node.type for s in info.names.values() if isinstance(s.node, Var) and s.node.type)
    return any(placed_within(t, depth + 2) for t in fields)


SEQUENCES = frozenset(
    {"builtins.list", "builtins.tuple", "typing.Sequence", "typing.Iterable", "builtins.slice"}
)


def items_of_both(t: ProperType, base: ProperType) -> Iterator[tuple[Type, Type]]:
    """The items of a type, each with what stands there in a type that it can be taken for."""
    if isinstance(t, TupleType) and isinstance(base, TupleType):
        yield from zip(t.items, base.items, strict=False)
    elif isinstance(t, TupleType) and isinstance(base, Instance):
        if base.type.fullname in SEQUENCES and base.args:
            yield from ((item, base.args[0]) for item in t.items)
    elif isinstance(t, Instance) and isinstance(base, Instance) and is_a(t, base):
        yield from zip(map_instance_to_supertype(t, base.type).args, base.args, strict=False)


def is_a(t: ProperType, base: Instance) -> bool:
    return isinstance(t, Instance) and t.type.has_base(base.type.fullname)


def is_number(t: Type) -> bool:
    p = get_proper_type(t)
    return isinstance(p, Instance) and p.type.fullname in (
        "builtins.int",
        "builtins.float",
        "builtins.complex",
    )


def is_any(t: Type | None) -> bool:
    return isinstance(get_proper_type(t), AnyType) if t is not None else False


# --- axes and kinds as values -----------------------------------------------------------------


def role_of(t: Type | None) -> str | None:
    """The role of an axis or of its process group, if it is known."""
    return _noted_after(t, _ROLE)


def with_role(t: Type, role: str) -> Type:
    p = get_proper_type(t)
    return _with_note(p, _ROLE + role) if isinstance(p, Instance) else t


def kind_value(t: Type | None) -> str | None:
    """The kind that an expression such as `S(0)` is, if it is known."""
    return _noted_after(t, _KIND)


def with_kind_value(t: Type, kind: str) -> Type:
    p = get_proper_type(t)
    return _with_note(p, _KIND + kind) if isinstance(p, Instance) else t


def _noted_after(t: Type | None, prefix: str) -> str | None:
    p: ProperType | None = None if t is None else get_proper_type(t)
    note = _note(p) if isinstance(p, Instance) else ""
    return note.removeprefix(prefix) if note.startswith(prefix) else None
