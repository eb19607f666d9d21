"""Kinds of a tensor without running anything: one for each role that is known.

Kinds are letters, `R`, `I`, `V`, `P`, or `S(dim)`. Two more stand for what is not known: a role
that is missing, and `?`, which says that an error was reported there already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Kinds: TypeAlias = Mapping[str, str]

ANY_ROLE = "*"  # what deterministic factories make is R on every axis
REPORTED = "?"

# The two presentations of the same ranks. A role of one is never a role of the other.
PRESENTATIONS = (("DP", "CP", "TP"), ("EDP", "EP", "ETP"))


def write(kinds: Kinds) -> str:
    """`DP:V TP:S(0)`: how kinds are kept in a type."""
    return " ".join(f"{role}:{kind}" for role, kind in kinds.items())


def read(text: str) -> dict[str, str]:
    return dict(part.split(":", 1) for part in text.split())


def shown(kinds: Kinds) -> str:
    """As one writes them in a signature: `DP[V] TP[S[0]]`."""
    return " ".join(f"{role}[{subscript(kind)}]" for role, kind in kinds.items())


def subscript(kind: str) -> str:
    return re.sub(r"S\((.*)\)", r"S[\1]", kind)


def letter(kind: str) -> str:
    """The key of tables: S for every dim."""
    return "S" if is_shard(kind) else kind


def is_shard(kind: str) -> bool:
    return kind.startswith("S")


def local(kind: str) -> str:
    """What operations see: a shard differs between ranks, as V does."""
    return "V" if is_shard(kind) else kind


def kind_on(kinds: Kinds, role: str) -> str | None:
    """The kind on a role; None where nothing is known."""
    found = kinds.get(role, kinds.get(ANY_ROLE))
    return None if found == REPORTED else found


def roles_of(many: Iterable[Kinds]) -> list[str]:
    """All roles that any of them speaks of, in the order of their first mention."""
    return list(dict.fromkeys(role for kinds in many for role in kinds))


def presentation(kinds: Kinds) -> tuple[str, ...] | None:
    """The presentation that kinds are given on; None where they name neither."""
    for roles in PRESENTATIONS:
        if any(role in kinds for role in roles):
            return roles
    return None


def on_presentation(kinds: Kinds, roles: tuple[str, ...] | None) -> Kinds | None:
    """The same tensor seen on the other presentation; None where that cannot be said.

    Between the meshes lies a regrouping of the same ranks, which carries over only what is the same
    on every axis.
    """
    have = presentation(kinds)
    if have is None or roles is None or have == roles:
        return kinds
    known = {local(kinds[role]) for role in have if role in kinds}
    others = {role: kind for role, kind in kinds.items() if role not in have}
    if REPORTED in known:
        return others
    if len(known) == 1 and all(role in kinds for role in have):
        return {**{role: known.copy().pop() for role in roles}, **others}
    return None


def fits(have: str, need: str) -> bool:
    """Whether a kind may stand where another is declared.

    Inside the layer a shard is V, and what is V may be declared a shard at a boundary; two shards
    along different dims are different.
    """
    if REPORTED in (have, need) or have == need:
        return True
    if is_shard(have) and is_shard(need):
        return False
    return local(have) == local(need) == "V"
