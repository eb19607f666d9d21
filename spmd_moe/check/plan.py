"""What a layout means for a model, before anything runs: rows, obligations, losses, collectives.

    plan = make_plan(target, Layout(dp=2, tp=4, ep=8), tokens=5)
    print(plan)                        # five tables
    plan.obligations, plan.collectives # the same, to ask

The model is built as one rank of a world that is not there; nothing of it runs. Numbers of rows at
the experts are those of even use; see `forecast.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from spmd_moe.check.forecast import forecast
from spmd_moe.check.layouts import Layout
from spmd_moe.check.mirror_world import mirror_world
from spmd_moe.check.target import Target, build
from spmd_moe.core.placement import CP, DP, EP, TP, Role
from spmd_moe.core.shard_shape import ShardShape
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.dispatch.default_dispatcher import expected_ranks
from spmd_moe.layer.dispatch.forecast import Collective
from spmd_moe.layer.moe import MoE
from spmd_moe.train.obligations import Obligations, obligations


@final
@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of one cell of dp and cp, on the ranks of tp."""

    layer: str
    shape: ShardShape

    @property
    def nature(self) -> str:
        if self.shape.total == 0:
            return "none"
        return "even" if self.shape.equal else "padded around collectives only"


@final
@dataclass(frozen=True, slots=True)
class Scale:
    """One loss term: over which ranks it is a sum, and what divides it, once."""

    layer: str
    term: str
    sums: tuple[Role, ...]  # the term is P on these
    whole: tuple[Role, ...]  # it is the same on these already
    divisor: str


@final
@dataclass(frozen=True, slots=True)
class SentRows:
    """Rows that the rank sends to experts in each direction, for two dispatchers.

    Expected numbers, with all experts equally likely. Rows to the rank itself are included.
    """

    layer: str
    dispatcher: str  # the one that the layer has
    all_to_all: int
    dedup: float

    @property
    def share(self) -> float:
        return self.dedup / self.all_to_all if self.all_to_all else 1.0


@final
@dataclass(frozen=True, slots=True)
class Plan:
    layout: Layout
    tokens: int
    rank: int
    rows: tuple[Rows, ...]
    obligations: Obligations
    scales: tuple[Scale, ...]
    sent: tuple[SentRows, ...]
    collectives: tuple[Collective, ...]
    # Layers whose dispatcher does not forecast, with its class: their collectives are left out.
    not_forecast: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.layout}, {self.tokens} tokens in each cell of dp and cp, rank {self.rank}"
        yield "\nRows of the tokens on tp"
        yield from table(
            ("layer", "rows per rank", "padded", "nature"),
            ((r.layer, str(list(r.shape.sizes)), str(r.shape.padded), r.nature) for r in self.rows),
        )
        yield "\nWhat each parameter owes, and where it is stored"
        yield str(self.obligations)
        yield "\nLoss terms"
        yield from table(
            ("layer", "term", "sum over", "whole on", "divided once by"), map(_scale, self.scales)
        )
        yield "\nRows that this rank sends to experts, each way, if all experts are equally likely"
        yield from table(
            ("layer", "dispatcher", "AllToAll", "DedupAllToAll", "share"), map(_sent, self.sent)
        )
        yield "\nCollectives that this rank issues, in order, if experts are chosen round-robin"
        yield from table(
            ("", "axis", "collective", "gives", "bytes", "", "what"), map(_move, self.collectives)
        )
        for layer, dispatcher in self.not_forecast:
            yield f"without those of {layer}: {dispatcher} does not forecast its collectives"
        total = sum(c.bytes for c in self.collectives)
        yield f"{len(self.collectives)} collectives, {total} bytes given"


def make_plan(target: Target, layout: Layout, tokens: int, rank: int = 0) -> Plan:
    """Build the target as `rank` and say what follows; a ValueError where it refuses the layout."""
    with mirror_world(layout.world, rank):
        mesh = layout.mesh()
        built = build(target, mesh, tokens)
        owed = obligations(built.module, mesh)
        modules = built.module.named_modules()
        layers = {name or "layer": m for name, m in modules if isinstance(m, MoE)}
        given = (t for t in built.args if isinstance(t, Tensor))  # a whole model is given token ids
        dtype = next(t.dtype for t in (*given, *built.module.parameters()) if t.is_floating_point())
        sizes = ShardShape.even(tokens, layout.tp).sizes
        tokens_r = [sizes[layout.place(r)[TP]] for r in range(layout.world)]
        issued = {n: forecast(m, layout, rank, tokens_r, dtype) for n, m in layers.items()}
        silent = (name for name, found in issued.items() if found is None)
        return Plan(
            layout,
            tokens,
            rank,
            tuple(Rows(name, ShardShape.even(tokens, layout.tp)) for name in layers),
            owed,
            tuple(scale for name, layer in layers.items() for scale in _scales(name, layer)),
            tuple(_sent_rows(n, layer, tokens_r[rank]) for n, layer in layers.items()),
            tuple(_in_order([found for found in issued.values() if found is not None])),
            tuple((name, type(layers[name].dispatcher).__name__) for name in silent),
        )


def _in_order(each: Sequence[Sequence[Collective]]) -> Iterator[Collective]:
    """Forward through the layers, and back through them."""
    for one in each:
        yield from (c for c in one if c.when == "forward")
    for one in reversed(each):
        yield from (c for c in one if c.when == "backward")


def _sent_rows(name: str, layer: MoE, tokens: int) -> SentRows:
    router, ep = layer.config.router, layer.mesh[EP].size
    ranks = expected_ranks(router.num_experts, router.top_k, ep)
    kind = type(layer.dispatcher).__name__
    return SentRows(name, kind, tokens * router.top_k, tokens * ranks)


def _scales(name: str, layer: MoE) -> Iterator[Scale]:
    whole_on_tp = layer.config.src != INSIDE
    sums, whole = ((DP, CP), (TP,)) if whole_on_tp else ((DP, CP, TP), ())
    balance = layer.config.balance
    if balance is None:
        return
    of = "the sequence" if balance == "sequence" else "the batch"
    groups = "; and by the sequences of the batch" if balance == "sequence" else ""
    yield Scale(
        name, "balance_loss", sums, whole, f"choices x tokens of {of}, on all ranks{groups}"
    )
    yield Scale(name, "z_loss", sums, whole, "tokens of the batch, on all ranks")


# --- tables -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they must be."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    if len(lines) == 1:
        yield "  none"
        return
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield f"  {'  '.join(cells)}".rstrip()


def _scale(scale: Scale) -> tuple[str, ...]:
    def roles(some: tuple[Role, ...]) -> str:
        return " ".join(map(str, some)) or "-"

    return scale.layer, scale.term, roles(scale.sums), roles(scale.whole), scale.divisor


def _sent(sent: SentRows) -> tuple[str, ...]:
    rows = str(sent.all_to_all), f"{sent.dedup:.0f}", f"{sent.share:.2f}"
    return sent.layer, sent.dispatcher, *rows


def _move(c: Collective) -> tuple[str, ...]:
    shape = f"{str(c.dtype).removeprefix('torch.')}{list(c.shape)}"
    nature = "even" if c.even else "uneven"
    return c.when, str(c.role), c.op, shape, str(c.bytes), nature, c.what
