"""Two presentations of the same ranks, under any names; and what makes no mesh."""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import pytest
import spmd_types
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from spmd_types import set_current_mesh
from spmd_types.checker import typecheck
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_moe import (
    CP,
    DP,
    EDP,
    EP,
    ETP,
    TP,
    MeshError,
    MoEMesh,
    P,
    R,
    Role,
    S,
    ShapeError,
    ShardShape,
    redistribute,
)
from spmd_moe.core.mesh_degrees import _nearest_divisor
from spmd_moe.core.placement import Kind
from tests.support.simulated_ranks import fake_world, simulated
from tests.support.workers import run

LAYOUTS = [
    (1, 1, 1, 1, 1),
    (2, 1, 1, 2, 1),
    (1, 1, 4, 2, 2),
    (2, 1, 2, 4, 1),
    (2, 2, 2, 2, 2),
    (1, 2, 4, 8, 1),
    (4, 1, 2, 1, 4),
]


def coordinates(rank: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major place of a rank: the last axis runs fastest."""
    place = []
    for size in reversed(sizes):
        place.append(rank % size)
        rank //= size
    return tuple(reversed(place))


def members(rank: int, axis: int, sizes: tuple[int, ...]) -> list[int]:
    """The ranks that differ from this one on that axis only."""
    mine = coordinates(rank, sizes)
    everyone = range(math.prod(sizes))
    return [
        other
        for other in everyone
        if all(
            a == b
            for i, (a, b) in enumerate(zip(mine, coordinates(other, sizes), strict=True))
            if i != axis
        )
    ]


def check(mesh: MoEMesh, rank: int, dense: tuple[int, ...], expert: tuple[int, ...]) -> None:
    for roles, sizes in (((DP, CP, TP), dense), ((EDP, EP, ETP), expert)):
        for number, role in enumerate(roles):
            axis = mesh[role]
            assert (axis.role, axis.size) == (role, sizes[number])
            assert axis.rank == coordinates(rank, sizes)[number]
            if axis.size > 1:
                ranks = dist.get_process_group_ranks(axis.group)
                assert ranks == members(rank, number, sizes)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_every_rank_of_every_layout(degrees: tuple[int, ...]) -> None:
    dp, cp, tp, ep, etp = degrees
    world = dp * cp * tp
    for rank in range(world):
        with fake_world(world, rank):
            mesh = MoEMesh.init("cpu", dp=dp, cp=cp, tp=tp, ep=ep, etp=etp)
            check(mesh, rank, (dp, cp, tp), (world // (ep * etp), ep, etp))
            assert mesh.dense.size() == mesh.expert.size() == world


def test_roles_under_the_users_names() -> None:
    for rank in range(8):
        with fake_world(8, rank):
            users = init_device_mesh("cpu", (2, 4), mesh_dim_names=("north", "east"))
            mesh = MoEMesh.from_device_mesh(users, dp="north", tp="east", ep=4)
            check(mesh, rank, (2, 1, 4), (2, 4, 1))
            assert mesh[TP].name == "east" and mesh[TP].group is users.get_group("east")
            assert repr(mesh) == "MoEMesh(north 2 x cp 1 x east 4 = edp 2 x ep 4 x etp 1)"


def test_roles_in_another_order_than_the_users_axes() -> None:
    """tp is the user's outer axis; the expert axes still follow dp, cp, tp."""
    for rank in range(4):
        with fake_world(4, rank):
            users = init_device_mesh("cpu", (2, 2), mesh_dim_names=("inner", "outer"))
            mesh = MoEMesh.from_device_mesh(users, tp="inner", dp="outer", ep=2)
            place = coordinates(rank, (2, 2))
            assert (mesh[TP].rank, mesh[DP].rank) == place
            in_role_order = place[1] * 2 + place[0]
            assert (mesh[EDP].rank, mesh[EP].rank) == coordinates(in_role_order, (2, 2))


def test_one_role_on_adjacent_axes() -> None:
    """HSDP: replicas of shards are the data axis together."""
    for rank in range(8):
        with fake_world(8, rank):
            users = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replica", "shard", "tp"))
            mesh = MoEMesh.from_device_mesh(users, dp=("replica", "shard"), tp="tp", etp=2)
            check(mesh, rank, (4, 1, 2), (4, 1, 2))
            assert mesh[DP].name == "replica_shard"


def test_an_expert_mesh_that_is_there_already() -> None:
    for rank in range(4):
        with fake_world(4, rank):
            dense = init_device_mesh("cpu", (4,), mesh_dim_names=("x",))
            expert = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "experts"))
            mesh = MoEMesh.from_device_mesh(
                dense, dp="x", expert=expert, edp="copies", ep="experts"
            )
            check(mesh, rank, (4, 1, 1), (2, 2, 1))
            assert mesh.expert is expert


def ranks_sum(degrees: dict[str, int]) -> dict[str, float]:
    """What an all-reduce of ranks gives on each axis of size above 1."""
    mesh = MoEMesh.init("cpu", **degrees)
    sums = {}
    for role in (DP, CP, TP, EDP, EP, ETP):
        x = torch.tensor([float(dist.get_rank())])
        sums[role.name] = redistribute(x, mesh[role], src=P, dst=R).item()
    return sums


@pytest.mark.gloo
def test_groups_hold_the_ranks_they_should() -> None:
    degrees = {"dp": 2, "cp": 2, "tp": 2, "ep": 2, "etp": 2}
    got = run(8, ranks_sum, degrees)
    for rank, sums in enumerate(got):
        for number, (dense, expert) in enumerate(
            zip(("dp", "cp", "tp"), ("edp", "ep", "etp"), strict=True)
        ):
            assert sums[dense] == sums[expert] == sum(members(rank, number, (2, 2, 2)))


# --- one process ------------------------------------------------------------------------------


def test_single_needs_no_process_group() -> None:
    assert not dist.is_initialized()
    mesh = MoEMesh.single()
    for role in (DP, CP, TP, EDP, EP, ETP):
        assert (mesh[role].size, mesh[role].rank, mesh[role].group.size()) == (1, 0, 1)
    x = torch.ones(3, 2)
    with set_current_mesh(frozenset()), typecheck("strict"):
        spmd_types.assert_type(x, {})
        moves: list[tuple[Kind, Kind]] = [(P, R), (P, S(1)), (R, S(0)), (S(0), R), (S(0), S(1))]
        for src, dst in moves:
            assert redistribute(x, mesh[TP], src=src, dst=dst) is x
    with pytest.raises(ShapeError, match="shape says 4 rows"):
        redistribute(x, mesh[TP], src=S(0), dst=R, shape=ShardShape.even(4, 1))
    with pytest.raises(MeshError, match="it has no DeviceMesh"):
        _ = mesh.dense


def test_simulated_ranks_have_coordinates_of_their_own() -> None:
    with simulated(4):
        mesh = MoEMesh.init("cpu", dp=2, tp=2, ep=4)
        assert "0: 0, 1: 1, 2: 0, 3: 1" in str(mesh[TP].rank)


# --- what makes no mesh -----------------------------------------------------------------------


def refused(world: int, **degrees: Any) -> str:
    with fake_world(world), pytest.raises(MeshError, match=r"MoEMesh\.init: ") as caught:
        MoEMesh.init("cpu", **degrees)
    return str(caught.value)


@pytest.mark.parametrize(
    ("world", "degrees", "text"),
    [
        (8, {"dp": 2, "tp": 3}, "dp 2 x cp 1 x tp 3 = 6 ranks, but the process group has 8"),
        (8, {"dp": 8, "ep": 3}, "ep 3 x etp 1 = 3 does not divide the 8 ranks"),
        (8, {"tp": 8, "ep": 4, "etp": 4}, "ep 4 x etp 4 = 16 does not divide the 8 ranks"),
        (4, {"dp": 4, "ep": 0}, "ep is 0; it must be an integer of 1 or more"),
        (4, {"dp": -4}, "dp is -4"),
        (4, {"dp": 2.0, "tp": 2}, "dp is 2.0"),
        (4, {"dp": "4"}, "dp is '4'"),
        (1, {"etp": True}, "etp is True"),
    ],
    ids=str,
)
def test_degrees_that_make_no_mesh(world: int, degrees: dict[str, Any], text: str) -> None:
    assert text in refused(world, **degrees)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_the_suggested_degrees_are_legal(world: int, ep: int, etp: int) -> None:
    if world % (ep * etp) == 0:
        return
    fix = refused(world, dp=world, ep=ep, etp=etp).split("fix: ")[1].split("   #")[0]
    suggested = dict(part.split("=") for part in fix.split(", "))
    with fake_world(world):
        MoEMesh.init("cpu", dp=world, **{name: int(n) for name, n in suggested.items()})


def test_nearest_divisor() -> None:
    assert [_nearest_divisor(n, 12) for n in (1, 5, 7, 8, 9, 100)] == [1, 4, 6, 6, 6, 12]


def test_without_a_process_group() -> None:
    with pytest.raises(MeshError, match="there is no default process group"):
        MoEMesh.init("cpu", dp=1)


def users_mesh(*names: str, sizes: tuple[int, ...] = (2, 2)) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


@pytest.mark.parametrize(
    ("binding", "text"),
    [
        ({"dp": "a"}, "axis 'b' (2 ranks) of the dense mesh is bound to no role"),
        ({"dp": "a", "tp": "a"}, "axis 'a' is bound twice, to dp and to tp"),
        ({"dp": "a", "tp": "c"}, "tp='c' is not an axis of the dense mesh, which has ['a', 'b']"),
        ({"dp": ("b", "a")}, "dp=('b', 'a') are not adjacent axes, in order, of ['a', 'b']"),
        ({"dp": "a", "tp": "b", "ep": "b"}, "ep='b', but there is no expert mesh"),
        ({"dp": "a", "tp": "b", "edp": 2}, "edp=2, but there is no expert mesh"),
        ({"dp": "a", "tp": "b", "ep": 3}, "ep 3 x etp 1 = 3 does not divide the 4 ranks"),
        ({"dp": "a", "tp": "b", "ep": 0}, "ep is 0; it must be an integer of 1 or more"),
        ({"dp": "a", "tp": 2}, "tp=2 is a size"),
    ],
    ids=str,
)
def test_bindings_that_make_no_mesh(binding: dict[str, Any], text: str) -> None:
    with fake_world(4), pytest.raises(MeshError, match=r"MoEMesh\.from_device_mesh: ") as caught:
        MoEMesh.from_device_mesh(users_mesh("a", "b"), **binding)
    assert text in str(caught.value)


def test_an_expert_mesh_of_other_ranks() -> None:
    with fake_world(4):
        dense = users_mesh("a", "b")
        expert = DeviceMesh("cpu", torch.tensor([0, 1]), mesh_dim_names=("e",))
        with pytest.raises(MeshError, match="are not the 2 of expert="):
            MoEMesh.from_device_mesh(dense, dp="a", tp="b", expert=expert, ep="e")


def test_a_slice_of_a_larger_mesh_needs_its_expert_mesh() -> None:
    with fake_world(4), pytest.raises(MeshError, match="the dense mesh has 2 of 4 ranks"):
        MoEMesh.from_device_mesh(users_mesh("pp", "dp")["dp"], dp="dp", ep=2)


def differing() -> str:
    """Each rank asks for another ep; rank 3 for nonsense."""
    try:
        MoEMesh.init("cpu", dp=4, ep=(1, 2, 4, -1)[dist.get_rank()])
    except MeshError as error:
        return str(error)
    return "no error"


@pytest.mark.gloo
def test_ranks_that_disagree_are_told_so_on_every_rank() -> None:
    """No rank hangs, not even beside one whose degrees are nonsense."""
    for text in run(4, differing):
        assert "the ranks were called with different settings" in text
        assert all(f"ep={n} " in text for n in (1, 2, 4, -1))


def differing_later() -> tuple[str, str]:
    """One rank derives another expert mesh; and on a mesh that is there, has other settings."""
    rank, mesh = dist.get_rank(), MoEMesh.init("cpu", dp=2, tp=2)
    told = []
    for disagree in (
        lambda: MoEMesh.from_device_mesh(mesh.dense, dp="dp", tp="tp", ep=1 + (rank == 1)),
        lambda: mesh.check_ranks_agree("here", {"width": 8 + (rank == 1)}),
    ):
        try:
            disagree()
            told.append("nothing")
        except MeshError as error:
            told.append(str(error))
    return told[0], told[1]


@pytest.mark.gloo
def test_ranks_that_disagree_later_are_told_so_too() -> None:
    """The groups of the axes, one after another, reach every rank, and name each by its number."""
    for derived, agreed in run(4, differing_later):
        assert "ep=1 on ranks [0, 2, 3] | ep=2 on ranks [1]" in derived
        assert "width=8 on ranks [0, 2, 3] | width=9 on ranks [1]" in agreed


def test_an_unknown_role() -> None:
    with pytest.raises(MeshError, match=r"mesh\[PP\] is not an axis") as caught:
        _ = MoEMesh.single()[Role("pp")]
    assert str(caught.value).count("fix: ") == 6


def test_the_name_of_an_axis_in_place_of_its_role() -> None:
    with fake_world(2):
        users = init_device_mesh("cpu", (2,), mesh_dim_names=("east",))
        mesh: Any = MoEMesh.from_device_mesh(users, tp="east")
    for name in ("tp", "east"):
        with pytest.raises(MeshError, match=rf"MoEMesh: mesh\['{name}'\] is not") as caught:
            mesh[name]
        assert re.findall("fix: (.*?)   #", str(caught.value)) == ["mesh[TP]"]
    for odd in (None, 0, ["tp"]):
        with pytest.raises(MeshError, match="is not an axis"):
            mesh[odd]


@pytest.mark.parametrize(
    ("axes", "binding", "fix"),
    [
        (("dp_shard", "tp"), {"dp": "dp_shard"}, "tp='tp'"),
        (("dp", "my_tp_axis"), {"dp": "dp"}, "tp='my_tp_axis'"),
        (("dp_replicate", "dp_shard"), {"dp": "dp_shard"}, "dp=('dp_replicate', 'dp_shard')"),
        (("dp_replicate", "dp_shard"), {"dp": "dp_replicate"}, "dp=('dp_replicate', 'dp_shard')"),
        (("a", "b"), {"dp": "a"}, "cp='b'"),
        (("a", "dp"), {"dp": "a"}, "dp=('a', 'dp')"),
        (("a", "b"), {"tp": "a"}, "dp='b'"),
    ],
    ids=str,
)
def test_an_axis_without_a_role_is_proposed_for_the_role_it_names(
    axes: tuple[str, str], binding: dict[str, Any], fix: str
) -> None:
    with fake_world(4):
        users = users_mesh(*axes)
        with pytest.raises(MeshError, match="is bound to no role") as caught:
            MoEMesh.from_device_mesh(users, **binding)
        assert re.findall("fix: (.*)", str(caught.value)) == [fix]
        role, names = fix.split("=")
        MoEMesh.from_device_mesh(users, **(binding | {role: ast.literal_eval(names)}))


def differing_in_a_stage() -> str:
    """The axes are those of a stage of a pipeline; in each stage one rank has other settings."""
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    mesh = MoEMesh.from_device_mesh(whole["dp"], dp="dp", expert=experts["ep"], ep="ep")
    try:
        mesh.check_ranks_agree("here", {"width": 8 + dist.get_rank() % 2})
    except MeshError as error:
        return str(error)
    return "nothing"


@pytest.mark.gloo
def test_ranks_are_told_by_their_numbers_in_the_job() -> None:
    said = run(4, differing_in_a_stage)
    assert all("width=8 on ranks [0] | width=9 on ranks [1]" in text for text in said[:2])
    assert all("width=8 on ranks [2] | width=9 on ranks [3]" in text for text in said[2:])
