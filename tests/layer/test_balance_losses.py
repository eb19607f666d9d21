"""The losses, on every split of one batch, against a loop over its tokens in one process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from spmd_types import MeshAxis, get_local_type
from torch import Tensor

from spmd_moe.check.signatures import checked, declare, signatures, what_ran
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import CP, DENSE, DP, TP, I, Kind, P, Placement, R, Role, S, V
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.balance_losses import (
    LossTerms,
    balance_loss,
    merge_microbatches,
    reduce_loss_terms,
    z_loss,
)
from spmd_moe.layer.moe import MoE
from spmd_moe.layer.moe_config import MoEConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.train.init_weights import init_weights
from tests.support import layer_oracle as oracle
from tests.support.layer_layouts import Layout, meaning
from tests.support.layer_runs import close, placements
from tests.support.workers import run

# Shape letters in this file:
#   B  sequences    L  length    D  model width    E  experts
WIDTH, EXPERTS, LENGTH = 3, 4, 7
STEPS = (3, 2)  # sequences of each micro-batch: few enough that some ranks have none
LENGTHS = (7, 3, 5, 1, 6)  # tokens of each sequence where there is a mask; the rest is padding
Balance = Literal["batch", "sequence"]
Results = dict[str, Tensor]  # losses, and gradients: "z", "z on x", "z on the router", ...


@dataclass(frozen=True)
class Setting:
    """One batch, how it is balanced, and how its tokens come to the ranks of tp."""

    balance: Balance
    masked: bool
    src: Kind
    dst: Kind
    score: Literal["softmax", "sigmoid"] = "softmax"
    lengths: tuple[int, ...] = LENGTHS

    @property
    def router(self) -> RouterConfig:
        return RouterConfig(EXPERTS, top_k=2, score_func=self.score, dtype=torch.float64)

    @property
    def whole(self) -> bool:
        return self.src in (R, I)


def batch() -> Tensor:
    shape = sum(STEPS), LENGTH, WIDTH
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def real_tokens(setting: Setting) -> Tensor:
    """The mask of the whole batch; without one, all of it."""
    lengths = torch.tensor(setting.lengths if setting.masked else [LENGTH] * sum(STEPS))
    return torch.arange(LENGTH) < lengths.unsqueeze(1)


def router_weight() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn((EXPERTS, WIDTH), generator=generator, dtype=torch.float64)


# --- the oracle -------------------------------------------------------------------------------


def balance_of(tokens: Sequence[Tensor], weight: Tensor, config: RouterConfig) -> Tensor:
    """What the module's docstring says, of tokens that are balanced together."""
    counts, probs = [0] * config.num_experts, [torch.zeros((), dtype=torch.float64)] * EXPERTS
    for x in tokens:
        scores = oracle.scores_of(weight @ x, config.score_func)
        for e in oracle.choose(weight @ x, torch.zeros(EXPERTS), config):
            counts[e] += 1
        shares = scores / scores.sum()
        probs = [p + shares[e] for e, p in enumerate(probs)]
    used = [n / max(sum(counts), 1) for n in counts]
    return sum(
        (EXPERTS * f * p / max(len(tokens), 1) for f, p in zip(used, probs, strict=True)),
        torch.zeros((), dtype=torch.float64),
    )


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


@lru_cache
def wanted(setting: Setting) -> Results:
    """Every loss of the whole batch, and its gradients."""
    x_BLD, weight = batch().requires_grad_(), router_weight().requires_grad_()
    real = real_tokens(setting)
    sequences = [
        [x for x, is_real in zip(*sequence, strict=True) if is_real]
        for sequence in zip(x_BLD, real, strict=True)
    ]
    first = [sum(STEPS[:i]) for i in range(len(STEPS))]
    steps = [sequences[i : i + n] for i, n in zip(first, STEPS, strict=True)]

    def one(groups: list[list[Tensor]]) -> Tensor:
        if setting.balance == "batch":
            return balance_of([x for tokens in groups for x in tokens], weight, setting.router)
        return mean([balance_of(tokens, weight, setting.router) for tokens in groups if tokens])

    def z(groups: list[list[Tensor]]) -> Tensor:
        logits = [weight @ x for tokens in groups for x in tokens]
        return mean([v.exp().sum().log() ** 2 for v in logits])

    losses = {
        "micro": mean([one(step) for step in steps]),
        "global": one(sequences),
        "z micro": mean([z(step) for step in steps]),
        "z global": z(sequences),
    }
    return with_gradients(losses, [x_BLD], weight)


def with_gradients(losses: Results, xs: Sequence[Tensor], weight: Tensor) -> Results:
    """The losses, with what each of them does to the input and to the router."""
    found = {name: loss.detach() for name, loss in losses.items()}
    for name, loss in losses.items():
        *on_x, on_router = torch.autograd.grad(loss, [*xs, weight], retain_graph=True)
        assert all(type(g) is Tensor for g in (*on_x, on_router)), "a gradient still travels"
        found[f"{name} on x"] = torch.cat([dx.flatten(0, -2) for dx in on_x])
        found[f"{name} on the router"] = on_router
    return found


def test_the_oracle_by_hand() -> None:
    """Three tokens alike: the two experts they choose get all of the choices."""
    config = RouterConfig(EXPERTS, top_k=2, dtype=torch.float64)
    weight = torch.diag(torch.ones(EXPERTS, dtype=torch.float64))[:, :WIDTH]
    x = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    p = [math.exp(v) / (math.e + 1 + math.e**2 + 1) for v in (1, 0, 2, 0)]
    assert balance_of([x] * 3, weight, config).item() == pytest.approx(4 * (p[0] + p[2]) / 2)


# --- the layer on a layout --------------------------------------------------------------------


def own(x: Tensor, layout: Layout, rank: int, whole_on_tp: bool) -> Tensor:
    """This rank's part of [B, L, ...]: sequences by dp, their positions by cp, then by tp."""
    place = layout.place(rank)
    cuts = [(DP, 0), (CP, 1)] if whole_on_tp else [(DP, 0), (CP, 1), (TP, 1)]
    for role, dim in cuts:
        shape = ShardShape.even(x.shape[dim], layout.sizes[role])
        x = x.narrow(dim, shape.offsets[place[role]], shape.sizes[place[role]])
    return x.clone()


def losses_of(terms: Sequence[LossTerms], mesh: MoEMesh) -> Results:
    """Every loss as a trainer would compute it, from the terms of all micro-batches."""
    counts = [reduce_loss_terms(t, mesh) for t in terms]
    own_z = [z_loss(t, n) for t, n in zip(terms, counts, strict=True)]
    own_balance = [balance_loss(t, n, mesh) for t, n in zip(terms, counts, strict=True)]
    of_all = list(zip(terms, merge_microbatches(counts), strict=True))
    return {
        "micro": torch.stack(own_balance).mean(),
        "global": torch.stack([balance_loss(t, total, mesh) for t, total in of_all]).sum(),
        "z micro": torch.stack(own_z).mean(),
        "z global": torch.stack([z_loss(t, total) for t, total in of_all]).sum(),
    }


def run_rank(layout: Layout, settings: Sequence[Setting]) -> list[Results]:
    mesh = MoEMesh.init("cpu", dp=layout.dp, cp=layout.cp, tp=layout.tp)
    return [run_setting(layout, setting, mesh) for setting in settings]


def build(setting: Setting, mesh: MoEMesh) -> MoE:
    config = MoEConfig(
        WIDTH, 2, setting.router, src=setting.src, dst=setting.dst, balance=setting.balance
    )
    layer = MoE(config, mesh).to(torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(0.1)
        layer.router.weight_ED.copy_(router_weight())
    return layer


def run_setting(layout: Layout, setting: Setting, mesh: MoEMesh) -> Results:
    layer, rank = build(setting, mesh), dist.get_rank()

    def cut(x: Tensor) -> list[Tensor]:
        return [own(step, layout, rank, setting.whole) for step in x.split(STEPS)]

    xs = [x.requires_grad_() for x in cut(batch())]
    masks = cut(real_tokens(setting)) if setting.masked else [None] * len(STEPS)
    outs: list[Any] = [layer(x, mask) for x, mask in zip(xs, masks, strict=True)]
    terms = [out.losses for out in outs]
    assert all(t.counts_BE.dtype is torch.int64 and t.tokens_B.dtype is torch.int64 for t in terms)
    assert all(type(t.z_sum) is Tensor for t in terms), "not yet waited for"
    losses = losses_of(terms, mesh)
    return with_gradients(losses, xs, layer.router.weight_ED)


def compare(layout: Layout, setting: Setting, by_rank: Sequence[Results]) -> None:
    """The ranks' losses and gradients together are the oracle's."""
    want = wanted(setting)

    def whole(name: str, tp: Kind) -> Tensor:
        return meaning([r[name] for r in by_rank], Placement((DP[P], CP[P], TP[tp])), layout)

    for loss in LOSSES:
        close(whole(loss, I if setting.whole else P), want[loss], loss)
        close(whole(f"{loss} on the router", I), want[f"{loss} on the router"], f"{loss}, router")
        assert want[loss] > 0.1 and want[f"{loss} on the router"].abs().max() > 1e-3
        compare_on_x(layout, setting, [r[f"{loss} on x"] for r in by_rank], want[f"{loss} on x"])


def compare_on_x(layout: Layout, setting: Setting, by_rank: list[Tensor], want: Tensor) -> None:
    """Gradients of the input: summed over tp where it is R there, else equal or of own rows."""
    assert want.abs().max() > 1e-3
    steps = want.view(sum(STEPS), LENGTH, WIDTH).split(STEPS)
    for rank in range(layout.world):
        got, cell = by_rank[rank], rank - rank % layout.tp
        if setting.src is R:
            got = torch.stack(by_rank[cell : cell + layout.tp]).sum(0)
        own_rows = [own(step, layout, rank, setting.whole).flatten(0, 1) for step in steps]
        close(got, torch.cat(own_rows), f"the input's gradient on rank {rank}")


LOSSES = ("micro", "global", "z micro", "z global")
WORLDS = (1, 2, 4, 6, 8)
LAYOUTS = [
    Layout(dp, cp, world // (dp * cp))
    for world in WORLDS
    for dp in range(1, world + 1)
    for cp in range(1, world + 1)
    if world % (dp * cp) == 0
]
BOUNDARIES: dict[str, tuple[Kind, Kind]] = {"S": (S(0), S(0)), "R": (R, R), "I": (I, I)}
MIXED: list[tuple[Kind, Kind]] = [(S(0), R), (S(0), I), (R, S(0)), (I, S(0)), (R, I), (I, R)]
BALANCES: tuple[Balance, ...] = ("batch", "sequence")


def check(layout: Layout, settings: Sequence[Setting]) -> None:
    by_rank = threaded(layout.world, run_rank, layout, settings)
    for i, setting in enumerate(settings):
        compare(layout, setting, [results[i] for results in by_rank])


# On one rank of tp all boundaries are the same; small worlds show it.
SPLITS = [
    (layout, boundary)
    for layout in LAYOUTS
    for boundary in BOUNDARIES
    if layout.tp > 1 or layout.world < 4 or boundary == "S"
]


@pytest.mark.parametrize(("layout", "boundary"), SPLITS, ids=str)
def test_losses_of_every_split(layout: Layout, boundary: str) -> None:
    """Ranks without tokens, and sequences cut over ranks, are among these."""
    src, dst = BOUNDARIES[boundary]
    check(layout, [Setting(b, True, src, dst) for b in BALANCES])


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("layout", [lay for lay in LAYOUTS if lay.world in (1, 4)], ids=str)
def test_losses_of_a_batch_without_padding(layout: Layout, boundary: str) -> None:
    src, dst = BOUNDARIES[boundary]
    check(layout, [Setting(b, False, src, dst) for b in BALANCES])


@pytest.mark.parametrize(("src", "dst"), MIXED, ids=str)
def test_losses_where_tokens_leave_as_they_did_not_come(src: Kind, dst: Kind) -> None:
    check(Layout(dp=2, tp=2), [Setting(b, True, src, dst) for b in BALANCES])


def test_losses_of_scores_that_are_not_a_softmax() -> None:
    settings = [Setting(b, True, S(0), S(0), "sigmoid") for b in BALANCES]
    check(Layout(dp=2, cp=2, tp=2), settings)


def test_a_sequence_of_padding_is_none() -> None:
    """It adds nothing, to the sum or to the number of sequences."""
    lengths = (7, 0, 5, 1, 0)
    for src in (S(0), I):
        settings = [Setting(b, True, src, src, lengths=lengths) for b in BALANCES]
        check(Layout(dp=2, tp=2), settings)


# --- types ------------------------------------------------------------------------------------


def types_on_rank(layout: Layout) -> list[dict[Role, list[Kind]]]:
    """The kinds of both losses on every axis, as the strict checker derives them."""
    mesh = MoEMesh.init("cpu", dp=layout.dp, cp=layout.cp, tp=layout.tp)
    axes = [mesh[role] for role in DENSE if layout.sizes[role] > 1]
    found: list[dict[Role, list[Kind]]] = []
    for setting in TYPED:
        layer = build(setting, mesh)
        x = own(batch(), layout, dist.get_rank(), setting.whole)
        mask = own(real_tokens(setting), layout, dist.get_rank(), setting.whole)
        for tensor in (x, mask):
            declare(tensor, Placement((DP[V], CP[V], TP[setting.src])), mesh)
        declared = placements(layer)
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            declare(tensor, declared[name], mesh)
        with signatures(["spmd_moe"]), checked(mesh):
            terms: Any = layer(x, mask).losses
            total = reduce_loss_terms(terms, mesh)
            losses = balance_loss(terms, total, mesh), z_loss(terms, total)
        assert {"loss_terms", "LossTerms.__init__"} <= what_ran()
        kinds = [get_local_type(loss) for loss in losses]
        found.append({axis.role: [k[MeshAxis.of(axis.group)] for k in kinds] for axis in axes})
    return found


TYPED = [Setting(b, True, kind, kind) for b in BALANCES for kind in (S(0), R, I)]


@pytest.mark.gloo
@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(cp=2, tp=2), Layout(dp=2, tp=2)], ids=str)
def test_losses_have_the_type_that_is_said_of_them(layout: Layout) -> None:
    for found in run(layout.world, types_on_rank, layout):
        for setting, kinds in zip(TYPED, found, strict=True):
            for role, (balance, z) in kinds.items():
                want = I if role == TP and setting.whole else P
                assert balance == z == want, (setting, role)


# --- edges ------------------------------------------------------------------------------------


def test_rows_without_a_batch_dim_are_one_sequence() -> None:
    """[T, D] is balanced by sequence as [1, T, D] is."""
    torch.manual_seed(0)
    mesh, x = MoEMesh.single(), torch.randn(1, 6, WIDTH)
    config = MoEConfig(WIDTH, 2, RouterConfig(EXPERTS, top_k=2), balance="sequence")
    layer = MoE(config, mesh)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    losses, both = [], (layer(x).losses, layer(x[0]).losses)
    for terms in both:
        assert terms is not None
        losses.append(balance_loss(terms, reduce_loss_terms(terms, mesh), mesh))
    assert torch.equal(*losses) and losses[0] > 1e-3


@pytest.mark.parametrize("shape", [(0, 5, WIDTH), (2, 0, WIDTH), (0, WIDTH)], ids=str)
@pytest.mark.parametrize("balance", BALANCES)
def test_a_batch_without_tokens_has_no_loss(shape: tuple[int, ...], balance: Balance) -> None:
    mesh = MoEMesh.single()
    config = MoEConfig(WIDTH, 2, RouterConfig(EXPERTS, top_k=2), balance=balance)
    layer = MoE(config, mesh)
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    terms: Any = layer(torch.ones(shape)).losses
    total = reduce_loss_terms(terms, mesh)
    loss = balance_loss(terms, total, mesh) + z_loss(terms, total)
    (gradient,) = torch.autograd.grad(loss, [layer.router.weight_ED])
    assert loss == 0 and gradient.count_nonzero() == 0


def test_no_terms_unless_asked_for() -> None:
    layer = MoE(MoEConfig(WIDTH, 2, RouterConfig(EXPERTS, top_k=2)), MoEMesh.single())
    init_weights(layer, layer.mesh, seed=0)
    assert layer(torch.ones(2, WIDTH)).losses is None
