"""Where a tensor lives: kinds, roles, and `Placed`, the type of a tensor with its placement.

A *kind* says what the ranks of one mesh axis hold, and so what their gradients are. The kinds are
spmd_types' own objects:

    R     every rank holds the whole; each computes with it on its own, so its gradient is P
    I     every rank holds the whole and does the same with it, so its gradient is I
    V     every rank holds something of its own
    P     the whole is the sum over the ranks
    S[i]  the whole is the ranks' tensors, joined along dim i

A *role* names a mesh axis by what it is for; `mesh.py` binds roles to the axes a user really has.
A *placement* gives one kind to each of some roles, and `Placed[Tensor, DP[V], TP[S[0]]]` writes it
into a signature, where checkers read it and the interpreter does not.
"""

# Mypy sees that `Placed` is defined twice, without our plugin, and with it, that one definition is
# below a condition that is never true. Both are meant.
# mypy: disable-error-code="no-redef, unreachable"

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import isclass, isroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, final

from spmd_types import I as I
from spmd_types import P as P
from spmd_types import PerMeshAxisLocalSpmdType, Shard
from spmd_types import R as R
from spmd_types import V as V
from torch import Tensor

from spmd_moe.core.errors import PlacementError, explain
from spmd_moe.core.messages import kinds_text

Kind: TypeAlias = PerMeshAxisLocalSpmdType | Shard

_WITH_PLUGIN = False  # in mypy's eyes our plugin makes it True

if TYPE_CHECKING:
    # To a checker without our plugin `Placed[Tensor, ...]` is a Tensor and nothing else, and `S[0]`
    # is an expression like `S(0)`: correct code raises no false alarm. Of two definitions mypy
    # binds the first that the plugin has not ruled out, and pyright never sees the second.
    if not _WITH_PLUGIN:
        from typing import Annotated as Placed
    elif False:

        class _Subscripted(type):
            def __getitem__(cls, items: object) -> object: ...

        class Placed(metaclass=_Subscripted): ...

    class _ShardKind:
        def __call__(self, dim: int) -> Shard: ...
        def __getitem__(self, dim: int) -> Shard: ...

    S = _ShardKind()
else:
    S = Shard
    # spmd_types writes S(0). A call inside an annotation is dropped by mypy before any plugin sees
    # it, so the class learns the bracket form too: S[0] == S(0), and S is still spmd_types' own.
    if not hasattr(Shard, "__class_getitem__"):
        Shard.__class_getitem__ = classmethod(lambda cls, dim: cls(dim))

    class Placed:
        """The type of a tensor with the kind that it has on each named role.

        `Placed[Tensor, DP[V], TP[S[0]]]` is a Tensor for the interpreter and for type checkers
        without the plugin. In annotations `S` takes square brackets.

        Raises:
            PlacementError: No role is named, or an item is not a role with a kind.

        Example:
            >>> from torch import Tensor
            >>> from spmd_moe import DP, TP, Placed, S, V
            >>> Tokens = Placed[Tensor, DP[V], TP[S[0]]]
            >>> def norm(x: Tokens) -> Tokens:
            ...     return x / x.norm()
        """

        def __class_getitem__(cls, items: object) -> object:
            tensor, *kinds = items if isinstance(items, tuple) else (items,)
            if not kinds:
                raise PlacementError(
                    explain(
                        "Placed",
                        f"{getattr(tensor, '__name__', tensor)} stands alone, without a role",
                        why="a tensor of which nothing is known needs no Placed",
                        fixes=["Placed[Tensor, DP[V], TP[S[0]]]", "Tensor"],
                    )
                )
            for kind in kinds:
                if not isinstance(kind, RoleKind):
                    raise PlacementError(
                        explain(
                            "Placed",
                            f"{kind!r} is not a role with a kind",
                            why="a kind means nothing without the mesh axis it is on",
                            fixes=["Placed[Tensor, DP[V], TP[S[0]]]"],
                        )
                    )
            return Annotated[tensor, Placement(tuple(kinds))]


@final
@dataclass(frozen=True, slots=True)
class Role:
    """A mesh axis, named by its purpose.

    `TP[S[0]]` is the kind S(0) on the axis of that role. The six roles of the package are `DP`,
    `CP`, `TP`, `EDP`, `EP`, `ETP`; make your own for other axes.

    Args:
        name: The name that messages show.

    Raises:
        PlacementError: On `role[kind]`, if `kind` is not R, I, V, P or `S[dim]`.

    Example:
        >>> from spmd_moe import Role, V
        >>> STAGE = Role("stage")
        >>> print(STAGE[V])
        stage:V
    """

    name: str

    def __getitem__(self, kind: Kind) -> RoleKind:
        return RoleKind(self, kind)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name.upper()


@final
@dataclass(frozen=True, slots=True)
class RoleKind:
    """The kind a tensor has on the axis of one role; prints as `tp:S(0)`."""

    role: Role
    kind: Kind

    def __post_init__(self) -> None:
        if not isinstance(self.kind, PerMeshAxisLocalSpmdType | Shard):
            raise PlacementError(
                explain(
                    repr(self.role),
                    f"{self.kind!r} is not a kind",
                    why="the kinds are R, I, V, P and S[dim]",
                    fixes=[f"{self.role!r}[S[0]]   # sharded on dim 0"],
                )
            )

    def __str__(self) -> str:
        return kinds_text([(self.role, self.kind)])


@final
@dataclass(frozen=True, slots=True)
class Placement:
    """One kind for each of some roles, as a frozen mapping from role to kind.

    Args:
        kinds: Roles with kinds, such as `(DP[V], TP[S[0]])`.

    Raises:
        PlacementError: A role occurs twice.

    Example:
        >>> from spmd_moe import DP, TP, Placement, R, V
        >>> placement = Placement((DP[V], TP[R]))
        >>> print(placement)
        dp:V tp:R
        >>> placement[TP] is R, DP in placement
        (True, True)
    """

    kinds: tuple[RoleKind, ...]

    def __post_init__(self) -> None:
        roles = [k.role for k in self.kinds]
        for role in roles:
            if roles.count(role) > 1:
                raise PlacementError(
                    explain(
                        "Placed",
                        f"role {role!r} stands twice in {self}",
                        why="a tensor has exactly one kind on a mesh axis",
                        fixes=[f"keep one of them, as in Placed[Tensor, {role!r}[R]]"],
                    )
                )

    def __getitem__(self, role: Role) -> Kind:
        for k in self.kinds:
            if k.role == role:
                return k.kind
        raise KeyError(role)

    def __contains__(self, role: object) -> bool:
        return any(k.role == role for k in self.kinds)

    def __iter__(self) -> Iterator[RoleKind]:
        return iter(self.kinds)

    def __str__(self) -> str:
        return " ".join(map(str, self.kinds))


def completed(placement: Placement, roles: Iterable[Role]) -> str:
    """The annotation that declares a tensor so on `roles`, with R where nothing is said."""
    said = {k.role: k.kind for k in placement}
    kinds = ((role, said.get(role, R)) for role in roles)
    each = (f"{r!r}[{f'S[{k.dim}]' if isinstance(k, Shard) else repr(k)}]" for r, k in kinds)
    return f"Placed[Tensor, {', '.join(each)}]"


def placement_of(annotation: object) -> Placement | None:
    """The placement written in an annotation, or None where there is none.

    Reads through aliases and through `Placed[...] | None`; takes what `typing.get_type_hints(f,
    include_extras=True)` returns for one name.
    """
    if typing.get_origin(annotation) is Annotated:
        _, *extras = typing.get_args(annotation)
        return next((e for e in extras if isinstance(e, Placement)), None)
    for member in typing.get_args(annotation):
        placement = placement_of(member)
        if placement is not None:
            return placement
    return None


def placements_of(function: Any) -> dict[str, Placement]:
    """The placement of each annotated argument of a function or class, and of its `return`.

    Of an object, such as a module, that of its class. What cannot be read is left out.
    """
    if not (hasattr(function, "__wrapped__") or isclass(function) or isroutine(function)):
        function = type(function)
    hints, _ = annotations_of(function)
    found = ((name, placement_of(hint)) for name, hint in hints.items())
    return {name: placement for name, placement in found if placement is not None}


# What evaluating an annotation raises. Ours raise PlacementError, which is shown.
_UNREADABLE = ArithmeticError, AttributeError, LookupError, NameError, SyntaxError, TypeError


def annotations_of(function: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The annotations of a function or class; and as they are written, those that cannot be
    evaluated, such as a name that is imported under `if TYPE_CHECKING:` only."""
    try:
        return typing.get_type_hints(function, include_extras=True), {}
    except _UNREADABLE:
        pass  # of one of them; the others can be read
    owners = reversed(function.__mro__) if isclass(function) else [inspect.unwrap(function)]
    hints: dict[str, Any] = {}
    unknown: dict[str, str] = {}
    for owner in owners:
        # A class that a program made may name no module that is loaded: some names stand in.
        names = vars(sys.modules.get(owner.__module__, typing))
        own = vars(owner) if isclass(owner) else {"__annotations__": owner.__annotations__}
        for name, written in own.get("__annotations__", {}).items():
            alone = types.SimpleNamespace(__annotations__={name: written})
            try:
                hints |= typing.get_type_hints(alone, names, dict(own), include_extras=True)
                unknown.pop(name, None)
            except _UNREADABLE:
                hints.pop(name, None)
                unknown[name] = str(written)
    return hints, unknown


# The dense presentation of the ranks, and the expert presentation of the same ranks.
DP, CP, TP = Role("dp"), Role("cp"), Role("tp")
EDP, EP, ETP = Role("edp"), Role("ep"), Role("etp")
DENSE, EXPERT = (DP, CP, TP), (EDP, EP, ETP)

# The few layouts of the layer. Dense: every rank has rows of its own tokens.
Tokens: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[V]]
TokenSums: TypeAlias = Placed[Tensor, DP[P], CP[P], TP[P]]
Whole: TypeAlias = Placed[Tensor, DP[R], CP[R], TP[R]]
RouterWeight: TypeAlias = Placed[Tensor, DP[R], CP[R], TP[I]]
SharedWeight: TypeAlias = Placed[Tensor, DP[R], CP[R], TP[I]]
HiddenInWeight: TypeAlias = Placed[Tensor, DP[R], CP[R], TP[S[0]]]
HiddenOutWeight: TypeAlias = Placed[Tensor, DP[R], CP[R], TP[S[1]]]
GatheredTokens: TypeAlias = Placed[Tensor, DP[V], CP[V], TP[R]]
CallersTokens: TypeAlias = Placed[Tensor, DP[V], CP[V]]  # on tp as `src` and `dst` say
# Expert: every rank has the rows that chose its experts.
Rows: TypeAlias = Placed[Tensor, EDP[V], EP[V], ETP[V]]
GatheredRows: TypeAlias = Placed[Tensor, EDP[V], EP[V], ETP[R]]
AllTokens: TypeAlias = Placed[Tensor, EDP[V], EP[R], ETP[R]]
RowSums: TypeAlias = Placed[Tensor, EDP[V], EP[V], ETP[P]]
ExpertInWeight: TypeAlias = Placed[Tensor, EDP[R], EP[S[0]], ETP[S[1]]]
ExpertHiddenBias: TypeAlias = Placed[Tensor, EDP[R], EP[S[0]], ETP[S[1]]]
ExpertOutBias: TypeAlias = Placed[Tensor, EDP[R], EP[S[0]], ETP[I]]
ExpertOutWeight: TypeAlias = Placed[Tensor, EDP[R], EP[S[0]], ETP[S[2]]]
