"""Error text is output: every message of the package, whole, in `golden/`.

After a deliberate change run `python -m tests.test_errors --write`, and read the diff.
"""

from __future__ import annotations

import ast
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import spmd_types
import torch
import torch.distributed as dist
from spmd_types import MeshAxis, set_current_mesh
from spmd_types.checker import typecheck
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spmd_moe import (
    EP,
    ETP,
    TP,
    I,
    MoEMesh,
    P,
    Placed,
    R,
    S,
    ShardShape,
    SpmdMoeError,
    V,
    redistribute,
)
from spmd_moe.core.collectives import declare_sum, exchange
from spmd_moe.layer import balance_losses, routing_faults
from spmd_moe.layer.activations import SWIGLU
from spmd_moe.layer.dispatch import AllToAll, FixedCapacity, Local
from spmd_moe.layer.expert_load import expert_load
from spmd_moe.layer.experts import Experts
from spmd_moe.layer.grouped_matmul import LoopedMatmul
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import ExpertRecompute, MoEConfig, SharedConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.selection_bias import update_selection_bias
from spmd_moe.train.init_weights import init_weights
from tests.support.messages import PACKAGE, Site, normal, sites_passed
from tests.support.refused_checkpoints import BAD_CHECKPOINTS
from tests.support.refused_jobs import ON_RANKS, sanitized
from tests.support.refused_models import BAD_MODELS
from tests.support.refused_routers import BAD_ROUTERS, routed
from tests.support.refused_uses import BAD_USES
from tests.support.simulated_ranks import fake_world

GOLDEN = Path(__file__).parent / "golden"


def moved(x: torch.Tensor, **how: object) -> Callable[[], object]:
    """A redistribute on an axis of four ranks."""

    def act() -> object:
        with fake_world(4):
            return redistribute(x, MoEMesh.init("cpu", tp=4)[TP], **how)  # type: ignore[arg-type]  # wrong on purpose

    return act


def meshed(world: int, **degrees: object) -> Callable[[], object]:
    def act() -> object:
        with fake_world(world):
            return MoEMesh.init(**({"device_type": "cpu"} | degrees))  # type: ignore[arg-type]  # wrong on purpose

    return act


def bound(**asked: object) -> Callable[[], object]:
    def act() -> object:
        binding = dict(asked)
        with fake_world(4):
            names: Any = binding.pop("names", ("a", "b"))
            users = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
            if binding.pop("sliced", False):
                users = users["a"]
            if binding.pop("others", False):
                binding["expert"] = DeviceMesh("cpu", torch.tensor([0, 1]), mesh_dim_names=("e",))
            return MoEMesh.from_device_mesh(users, **binding)  # type: ignore[arg-type]  # wrong on purpose

    return act


def built(
    world: int = 4, x: torch.Tensor | None = None, **settings: object
) -> Callable[[], object]:
    def act() -> object:
        with fake_world(world):
            mesh = MoEMesh.init("cpu", tp=world, ep=world)
            config = {"dim": 4, "hidden_dim": 8, "router": RouterConfig(8, 2)} | settings
            layer = MoE(MoEConfig(**config), mesh)  # type: ignore[arg-type]  # wrong on purpose
            return layer if x is None else layer(x)

    return act


def dispatched(make: Callable[[MoEMesh], object]) -> Callable[[], object]:
    def act() -> object:
        with fake_world(2):
            mesh = MoEMesh.init("cpu", tp=2, ep=2)
            return MoE(MoEConfig(4, 8, RouterConfig(8, 2)), mesh, make(mesh))  # type: ignore[arg-type]  # wrong on purpose

    return act


def called(*args: Any) -> Callable[[], Any]:
    def act() -> object:
        layer = MoE(MoEConfig(4, 8, RouterConfig(8, 2)), MoEMesh.single())
        init_weights(layer, layer.mesh, seed=0)
        return layer(*args)

    return act


def experts(
    rows: int, *counts: int, dtype: torch.dtype = torch.float32, scores: int | None = None
) -> Callable[[], object]:
    def act() -> object:
        layer = Experts(
            2, 4, 8, MoEMesh.single(), activation=SWIGLU, bias=False, recompute=ExpertRecompute.NONE
        )
        scores_R = None if scores is None else torch.ones(scores)
        return layer(torch.ones(rows, 4, dtype=dtype), torch.tensor(counts), scores_R)

    return act


def exchanged(kind: object, local: bool) -> Callable[[], object]:
    def act() -> object:
        with fake_world(2):
            group, x = dist.group.WORLD, torch.ones(2, 3)
            assert group is not None
            with set_current_mesh({"tp": MeshAxis.of(group)}), typecheck("strict", local=local):
                spmd_types.assert_type(x, {group: kind})  # type: ignore[dict-item]  # a kind
                return exchange(x, group, receives=[1, 1], sends=[1, 1])

    return act


x53, x34, ids = torch.ones(5, 3), torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64)
CASES: dict[str, Callable[[], object]] = {
    "placed_without_kind": lambda: Placed[torch.Tensor, TP],
    "placed_alone": lambda: Placed[torch.Tensor],
    "placed_role_twice": lambda: Placed[torch.Tensor, TP[R], TP[V]],
    "role_with_no_kind": lambda: TP["S"],  # type: ignore[index]  # wrong on purpose
    "shard_no_ranks": lambda: ShardShape.ragged([]),
    "shard_negative": lambda: ShardShape.ragged([2, -1]),
    "even_no_ranks": lambda: ShardShape.even(3, 0),
    "even_negative": lambda: ShardShape.even(-1, 2),
    "mesh_no_process_group": lambda: MoEMesh.init("cpu", dp=2),
    "mesh_by_name": lambda: MoEMesh.single()["tp"],  # type: ignore[index]  # wrong on purpose
    "mesh_degree": meshed(4, dp=4, ep=0),
    "mesh_pipeline": lambda: MoEMesh.init("cpu", pp=2),  # type: ignore[call-arg]  # as a user may
    "mesh_no_such_axis": lambda: MoEMesh.init("cpu", fsdp=2),  # type: ignore[call-arg]  # same
    "mesh_dense_product": meshed(8, dp=2, tp=3),
    "mesh_dense_product_unsolvable": meshed(7, dp=2, tp=3),
    "mesh_expert_product": meshed(8, dp=8, ep=3),
    "mesh_single_has_no_device_mesh": lambda: MoEMesh.single().dense,
    "bind_size_for_name": bound(dp="a", tp=2),
    "bind_unknown_name": bound(dp="a", tp="c"),
    "bind_twice": bound(dp="a", tp="a"),
    "bind_not_at_all": bound(dp="a"),
    "bind_by_its_name": bound(dp="a", names=("a", "tp")),
    "bind_together": bound(dp="dp_shard", names=("dp_replicate", "dp_shard")),
    "bind_not_adjacent": bound(dp=("b", "a")),
    "bind_expert_name_without_mesh": bound(dp="a", tp="b", ep="b"),
    "bind_slice": bound(dp="a", ep=2, sliced=True),
    "bind_expert_of_other_ranks": bound(dp="a", tp="b", ep="e", others=True),
    "move_from_v": moved(x53, src=V, dst=R),
    "move_to_v": moved(x53, src=R, dst=V),
    "move_no_such_dim": moved(x53, src=R, dst=S(2)),
    "move_to_the_class_s": moved(x53, src=R, dst=S),
    "move_from_text": moved(x53, src="R", dst=S(0)),
    "move_shape_list": moved(x53, src=R, dst=S(0), shape=[2, 2, 1, 0]),
    "move_dtype_text": moved(x53, src=P, dst=R, dtype="float32"),
    "move_on_a_role": lambda: redistribute(x53, TP, src=P, dst=R),  # type: ignore[arg-type]  # wrong on purpose
    "sum_on_a_name": lambda: declare_sum(x53, "ep"),  # type: ignore[arg-type]  # as below
    "move_on_a_name": lambda: redistribute(x53, "ep", src=P, dst=R),  # type: ignore[arg-type]  # wrong on purpose
    "mesh_device_type": lambda: MoEMesh.single("gpu"),
    "mesh_device_index": meshed(1, device_type="cuda:0"),
    "layer_pickled": lambda: pickle.dumps(_layer()),
    "mesh_pickled": lambda: pickle.dumps(MoEMesh.single()),
    "move_needs_shape": moved(x53, src=R, dst=S(0)),
    "move_shape_without_shard": moved(x53, src=P, dst=R, shape=ShardShape.even(5, 4)),
    "move_two_shapes_for_one": moved(x53, src=P, dst=S(0), shape=(ShardShape.even(5, 4),) * 2),
    "move_shape_contradicts_rows": moved(x53, src=S(0), dst=R, shape=ShardShape.even(5, 4)),
    "move_shape_contradicts_whole": moved(x53, src=R, dst=S(0), shape=ShardShape.even(6, 4)),
    "move_shape_of_other_ranks": moved(x53, src=R, dst=S(0), shape=ShardShape.even(5, 3)),
    "move_grad_dtype": moved(
        torch.ones(4, 3, dtype=torch.bfloat16, requires_grad=True), src=S(0), dst=R
    ),
    "exchange_of_a_whole": exchanged(S(0), local=False),
    "exchange_of_a_sum": exchanged(P, local=True),
    "whole_number": routed(top_k=2.0),
    "config_width": lambda: MoEConfig(0, 8, RouterConfig(8, 2)),
    "config_balance": lambda: MoEConfig(4, 8, RouterConfig(8, 2), balance="all"),  # type: ignore[arg-type]  # wrong on purpose
    "config_activation": built(activation="swiglu"),
    "moe_without_mesh": lambda: MoE(MoEConfig(4, 8, RouterConfig(8, 2)), None),  # type: ignore[arg-type]  # wrong on purpose
    "dispatcher_without_mesh": lambda: AllToAll(None, 8),  # type: ignore[arg-type]  # wrong on purpose
    "matmul_class": lambda: _layer(matmul=LoopedMatmul),
    "dispatcher_class": dispatched(lambda mesh: AllToAll),
    "dispatcher_of_other_experts": dispatched(lambda mesh: AllToAll(mesh, 16)),
    "dispatcher_of_other_mesh": dispatched(lambda mesh: Local(MoEMesh.single())),
    "init_other_mesh": lambda: _initialised(lambda layer: (layer, MoEMesh.single())),
    "init_undeclared": lambda: _initialised(
        lambda layer: (torch.nn.Sequential(torch.nn.Linear(4, 4), layer), layer.mesh)
    ),
    "init_std": lambda: init_weights(_layer(), MoEMesh.single(), seed=0, std=-1.0),
    "init_meta": lambda: init_weights(_layer().to("meta"), MoEMesh.single(), seed=0),
    "losses_none": lambda: balance_losses.reduce_loss_terms(None, MoEMesh.single()),  # type: ignore[arg-type]  # wrong on purpose
    "bias_of_no_list": lambda: update_selection_bias(_layer().router, MoEMesh.single(), 0.1),  # type: ignore[arg-type]  # wrong on purpose
    "bias_of_layers": lambda: update_selection_bias([_layer()], MoEMesh.single(), 0.1),  # type: ignore[list-item]  # wrong on purpose
    "bias_by_nan": lambda: update_selection_bias([_layer().router], MoEMesh.single(), float("nan")),
    "experts_over_ep": built(router=RouterConfig(6, 2)),
    "boundary_kind": built(src=S(1)),
    "boundary_kind_as_text": lambda: MoEConfig(4, 8, RouterConfig(8, 2), dst="I"),  # type: ignore[arg-type]  # wrong on purpose
    "shared_hidden": built(shared=SharedConfig(6, sharded=True)),
    "fixed_no_room": lambda: FixedCapacity(MoEMesh.single(), 4, 0),
    "experts_dtype": experts(3, 1, 2, dtype=torch.float64),
    "experts_scores": experts(3, 1, 2, scores=1),  # of one row: it would be broadcast
    "experts_counts": experts(3, 1, 3),
    "moe_width": called(torch.ones(3, 5)),
    "moe_list": called([1.0, 2.0]),
    "load_of_tokens": lambda: expert_load(x34, MoEMesh.single()),  # type: ignore[arg-type]  # wrong on purpose
    "moe_one_token": called(torch.ones(4)),
    "moe_dims": called(torch.ones(2, 3, 5, 4)),
    "moe_dtype": called(torch.ones(3, 4, dtype=torch.bfloat16)),
    "moe_dtype_of_no_weight": called(torch.ones(3, 4, dtype=torch.int64)),
    "moe_mask_dtype": called(torch.ones(3, 4), torch.ones(3)),
    "moe_ids_shape": called(torch.ones(3, 4), None, ids[:2]),
    "moe_device": called(torch.ones(3, 4, device="meta")),
    "moe_mask": called(torch.ones(3, 4), torch.ones(2, dtype=torch.bool)),
    "moe_expert_ids": called(torch.ones(3, 4), None, ids.to(torch.int32)),
    "moe_scores": called(torch.cat([x34[:1] * torch.nan, x34[1:]])),
    "moe_scores_of_ranks": lambda: _told([0, 1, 0, 1 + (1 << 40)]),
    "moe_refused_by_another": lambda: _told([0, 1, routing_faults.REFUSED, 0]),
    "moe_never_initialised": lambda: MoE(MoEConfig(4, 8, RouterConfig(8, 2)), MoEMesh.single())(
        x34
    ),
    "moe_ids_out_of_range": called(torch.ones(3, 4), None, ids + 8),
    "totals_of_sequences": lambda: _of_sequences() + _of_sequences(),
    "sanitize_rate": lambda: sanitized(rate=10.0),
    "sanitize_twice": lambda: sanitized(twice=True),
    "moe_mask_device": called(torch.ones(3, 4), torch.ones(3, dtype=torch.bool, device="meta")),
    **BAD_MODELS,
    **BAD_ROUTERS,
    **BAD_USES,
    **BAD_CHECKPOINTS,
}


def _told(marks: list[int]) -> None:
    with fake_world(4):
        mesh = MoEMesh.init("cpu", tp=4, ep=2, etp=2)
        routing_faults.check_marks(marks, (mesh[ETP], mesh[EP]), 8)


def _layer(**given: Any) -> MoE:
    return MoE(MoEConfig(4, 8, RouterConfig(8, 2)), MoEMesh.single(), **given)


def _initialised(pick: Callable[[MoE], tuple[torch.nn.Module, MoEMesh]]) -> None:
    with fake_world(2):
        mesh = MoEMesh.init("cpu", tp=2, ep=2)
        init_weights(*pick(MoE(MoEConfig(4, 8, RouterConfig(8, 2)), mesh)), seed=0)


def _of_sequences() -> balance_losses.Totals:
    one = torch.ones(1)
    return balance_losses.Totals(one, one, one, one, by_sequence=True)


def message(act: Callable[[], object]) -> tuple[str, list[Site]]:
    """What is raised, with the place of the caller left out, and the lines it came through."""
    try:
        act()
    except (SpmdMoeError, spmd_types.SpmdTypeError) as error:
        passed: list[Site] = []
        link: BaseException | None = error
        while link is not None:
            passed += sites_passed(link.__traceback__)
            link = link.__context__
        return normal(str(error)), passed
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    assert message(CASES[name])[0] == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.gloo
@pytest.mark.parametrize("name", ON_RANKS)
def test_message_of_several_ranks(name: str) -> None:
    assert normal(ON_RANKS[name]()[0]) == (GOLDEN / f"{name}.txt").read_text()


def test_the_parts_stand_in_order() -> None:
    """Where and what, why, fixes, the line: in all messages that we build."""
    for path in GOLDEN.glob("*.txt"):
        if path.stem.startswith("exchange_"):
            continue  # raised inside spmd_types' checker, which has a form of its own
        labels = [line[:7].strip() for line in path.read_text().splitlines()[1:]]
        assert labels == ["why:"] + ["fix:"] * (len(labels) - 2) + ["at:"], path.name
        assert "fix:" in labels, f"{path.name}: it does not say what to do"


def test_no_message_contains_a_value() -> None:
    secret = torch.full((5, 3), 12345.678)
    with pytest.raises(SpmdMoeError, match="no move V -> R") as caught:
        moved(secret, src=V, dst=R)()
    assert "12345" not in str(caught.value)


# Messages of Python's protocols, of other packages, of mypy, and those that are raised again.
WITHOUT_GOLDEN = {
    "raise KeyError(role)",
    "raise AttributeError",
    "raise TypeError(found",
    "raise failed",
    "raise wrong",
    "raise CompileError(",  # pinned in tests/static/test_plugin.py
    "raise ImportError(",
    "raise DamagedFileError",
    "raise NoConversionError",
}


def raise_sites(source: str) -> list[tuple[int, int]]:
    """First and last line of every `raise`, and of every call of a function that only raises."""
    sites = []
    for node in ast.walk(ast.parse(source)):
        call = node.value if isinstance(node, ast.Expr) else None
        refuses = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "_refuse"
        raises = isinstance(node, ast.Raise) and node.exc is not None  # not once more
        if isinstance(node, ast.stmt) and (raises or refuses):
            text = ast.get_source_segment(source, node) or ""
            if not any(text.startswith(known) for known in WITHOUT_GOLDEN):
                sites.append((node.lineno, node.end_lineno or node.lineno))
    return sites


@pytest.mark.gloo
def test_every_raise_has_a_golden_message() -> None:
    passed = {site for act in CASES.values() for site in message(act)[1]}
    passed |= {
        site for name in ("ranks_disagree", "sanitize_state") for site in ON_RANKS[name]()[1]
    }
    missing = [
        f"{path.relative_to(PACKAGE)}:{first}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if "check"
        not in path.relative_to(PACKAGE).parts  # what the checks say is pinned in their own tests
        for first, last in raise_sites(path.read_text())
        if not any((str(path), line) in passed for line in range(first, last + 1))
    ]
    assert missing == []


def test_the_walk_over_raises_can_fail() -> None:
    assert raise_sites("def f():\n    raise ValueError(\n        'x'\n    )\n") == [(2, 4)]
    assert raise_sites("_refuse('a', 'b', 'c')") == [(1, 1)]


def test_the_line_is_the_users() -> None:
    with pytest.raises(SpmdMoeError, match=r"at:  .*test_errors.py:\d+$"):
        ShardShape.even(-1, 2)
    assert I is not R


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    for name, act in CASES.items():
        (GOLDEN / f"{name}.txt").write_text(message(act)[0])
    for name, on_ranks in ON_RANKS.items():
        (GOLDEN / f"{name}.txt").write_text(normal(on_ranks()[0]))
