"""Which placement each parameter and buffer of a module has: by its class, or by a declaration.

A class declares in its body (`weight_ED: RouterWeight`). Modules of torch, or of other people, have
no such bodies; `declare_placements` does it for them, by name. Both ways fail closed: a tensor that
is not declared is an error where it is needed; one that is declared twice, or does not exist, is an
error at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from spmd_moe.core.errors import PlacementError, explain
from spmd_moe.core.placement import Placement, placement_of, placements_of

_OF_INSTANCE = "_declared_placements"  # in the instance's own dict, so that copies have it too
_of_class: Callable[[type], dict[str, Placement]] = cache(placements_of)


def declare_placements(
    model: nn.Module, placements: Mapping[str, object] | None = None, *, rest: object = None
) -> None:
    """Declare the placements of parameters and buffers by name, for modules that you do not own.

    Args:
        model: The module.
        placements: From a name, or a pattern with `*`, to a `Placed[...]` or a `Placement`.
        rest: The placement of every parameter and buffer that still has none, for
            example those of a model around layers that declare their own.

    Raises:
        PlacementError: A key matches nothing, a tensor is declared twice, or a value is not a
            placement.

    Example:
        >>> from torch import Tensor, nn
        >>> from spmd_moe import CP, DP, TP, I, Placed, R, declare_placements
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> declare_placements(model, {"*.bias": Placed[Tensor, DP[R], CP[R], TP[I]]})
        >>> declare_placements(model, rest=Placed[Tensor, DP[R], CP[R], TP[I]])
    """
    chosen: dict[str, Placement] = {}
    all_names = declarations(model, persistent=False)
    known = {name for name, placement in all_names.items() if placement is not None}
    first: dict[str, str] = {}
    for key, annotation in (placements or {}).items():
        placement = _placement(repr(key), annotation)
        names = [name for name in all_names if fnmatchcase(name, key)]
        if not names:
            raise PlacementError(
                explain(
                    "declare",
                    f"{key!r} names no parameter or buffer of {type(model).__name__}",
                    why="a declaration of nothing is a misspelt one",
                    fixes=[f"{name!r}" for name in list(all_names)[:3]],
                )
            )
        for name in names:
            if name in first or name in known:
                by = f"{first[name]!r}" if name in first else "its class or an earlier call"
                raise PlacementError(
                    explain(
                        "declare",
                        f"{key!r} names {name!r}, which is declared by {by}",
                        why="a tensor has one placement",
                        fixes=[f"a pattern in place of {key!r} that does not match {name!r}"],
                    )
                )
            first[name], chosen[name] = key, placement
    if rest is not None:
        of_rest = _placement("rest", rest)
        chosen |= {name: of_rest for name in all_names if name not in first and name not in known}
    for name, placement in chosen.items():
        prefix, _, own = name.rpartition(".")
        module = model.get_submodule(prefix)
        vars(module).setdefault(_OF_INSTANCE, {})[own] = placement


def declared(module: nn.Module) -> dict[str, Placement]:
    """The placements of a module's own parameters and buffers, by name."""
    own: dict[str, Placement] = vars(module).get(_OF_INSTANCE, {})
    return {**_of_class(type(module)), **own}


def declarations(model: nn.Module, *, persistent: bool = True) -> dict[str, Placement | None]:
    """Each parameter and buffer of a model, under every name; None: not declared.

    Args:
        model: The model.
        persistent: Whether buffers that are in no state dict, such as tables, are left out.
    """
    found: dict[str, Placement | None] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = declared(module)
        names = [name for name, p in module._parameters.items() if p is not None]
        skipped = module._non_persistent_buffers_set if persistent else ()
        names += [n for n, b in module._buffers.items() if b is not None and n not in skipped]
        for name in names:
            found[f"{prefix}.{name}" if prefix else name] = own.get(name)
    return found


def _placement(of: str, annotation: object) -> Placement:
    placement = annotation if isinstance(annotation, Placement) else placement_of(annotation)
    if placement is None:
        raise PlacementError(
            explain(
                "declare",
                f"{annotation!r} for {of} is not a placement",
                why="it must say what every rank holds",
                fixes=["Placed[Tensor, DP[R], CP[R], TP[I]]   # the whole, used alike on tp"],
            )
        )
    return placement
