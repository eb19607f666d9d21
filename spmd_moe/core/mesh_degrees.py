"""Degrees of parallelism that make a mesh, and those that do not: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeAlias, TypeVar, cast

import torch

from spmd_moe.core.errors import MeshError, explain
from spmd_moe.core.placement import DENSE, TP, Role

Given = ParamSpec("Given")
Made = TypeVar("Made")
Groups: TypeAlias = Sequence[Sequence[int]]  # the ranks of each


def check_device_type(where: str, device_type: object) -> None:
    try:
        known = torch.device(cast(str, device_type)).type == device_type
    except (RuntimeError, TypeError):
        known = False
    if not known:
        raise MeshError(
            explain(
                where,
                f"{device_type!r} is not a type of device",
                why="all ranks have devices of one type, each rank its own",
                fixes=["'cpu'", "'cuda'"],
            )
        )


def refuses_other_axes(where: str) -> Callable[[Callable[Given, Made]], Callable[Given, Made]]:
    """Explain a keyword that the function does not have, which names an axis.

    Type checkers see the function as it is, and report such a keyword on their own.
    """

    def decorate(function: Callable[Given, Made]) -> Callable[Given, Made]:
        known = signature(function).parameters

        @wraps(function)
        def checked(*args: Given.args, **kwargs: Given.kwargs) -> Made:
            for name in kwargs:
                if name not in known:
                    raise _no_such_axis(where, name)
            return function(*args, **kwargs)

        return checked

    return decorate


def _no_such_axis(where: str, name: str) -> MeshError:
    """A pipeline has a mesh for each stage."""
    why = "the axes are dp, cp and tp for the dense part of a model, ep and etp for experts"
    fixes = ["dp=2   # data parallel, also for FSDP", "ep=2   # expert parallel"]
    if name in ("pp", "pipeline"):
        why = "each stage of a pipeline has a mesh of its own ranks"
        fixes = [
            "world = init_device_mesh('cpu', (2, 4), mesh_dim_names=('pp', 'dp'))",
            "MoEMesh.from_device_mesh(world['dp'], dp='dp', expert=world['dp'], ep='dp')",
        ]
    return MeshError(explain(where, f"there is no axis {name!r}", why=why, fixes=fixes))


def check_degrees(where: str, degrees: Mapping[str, object]) -> None:
    for name, degree in degrees.items():
        if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
            raise MeshError(
                explain(
                    where,
                    f"{name} is {degree!r}; it must be an integer of 1 or more",
                    why="it is a number of ranks",
                    fixes=[f"{name}=1"],
                )
            )


def check_dense(where: str, degrees: Mapping[str, int], world: int) -> None:
    sizes = {name: degrees[name] for name in ("dp", "cp", "tp")}
    product = math.prod(sizes.values())
    if product != world:
        solved = {
            n: world // (product // d) for n, d in sizes.items() if world % (product // d) == 0
        }
        fixes = [f"{n}={d}   # the others as they are" for n, d in solved.items()]
        raise MeshError(
            explain(
                where,
                f"{' x '.join(f'{n} {d}' for n, d in sizes.items())} = {product} ranks, "
                f"but the process group has {world}",
                why="the dense mesh holds every rank exactly once",
                fixes=fixes or [f"dp={world}, cp=1, tp=1"],
            )
        )


def expert_data_degree(where: str, ep: int, etp: int, world: int) -> int:
    """edp: how many ranks hold the same experts."""
    if world % (ep * etp) == 0:
        return world // (ep * etp)
    fit_etp = _nearest_divisor(etp, world)
    fit_ep = _nearest_divisor(ep, world // fit_etp)
    raise MeshError(
        explain(
            where,
            f"ep {ep} x etp {etp} = {ep * etp} does not divide the {world} ranks",
            why="the expert mesh holds every rank exactly once, as edp x ep x etp",
            fixes=[f"ep={fit_ep}, etp={fit_etp}   # the nearest that fit"],
        )
    )


def _nearest_divisor(wanted: int, whole: int) -> int:
    divisors = (d for d in range(1, whole + 1) if whole % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def tell_axes(tp_groups: Groups, expert_groups: Groups) -> tuple[Role, ...]:
    """Along which axes ranks have to tell something, besides in a dispatch, which reaches a group
    of experts (of ep and etp together), so that all who hear of it are whole groups of tp."""
    if _each_within_one(tp_groups, expert_groups):
        return ()
    # Groups that partially overlap are linked like a chain, so all ranks report.
    return (TP,) if _each_within_one(expert_groups, tp_groups) else DENSE


def _each_within_one(small: Groups, large: Groups) -> bool:
    group_of = {rank: number for number, ranks in enumerate(large) for rank in ranks}
    return all(len({group_of[rank] for rank in ranks}) == 1 for ranks in small)
