"""Configurations of one layout: coordinates and numbers of tokens, traced and compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

from spmd_moe.check.compare_coordinates import compare
from spmd_moe.check.compare_one_process import check_values
from spmd_moe.check.findings import Finding
from spmd_moe.check.layouts import Layout
from spmd_moe.check.target import CannotCheckError, Target
from spmd_moe.check.trace import Configuration, Trace, standing, trace
from spmd_moe.core.placement import DENSE, EXPERT, TP


@final
@dataclass(slots=True)
class Result:
    """The result of one layout."""

    layout: Layout
    traced: int = 0
    tensors: int = 0
    untyped: int = 0
    refused: str = ""  # why the target does not build it, if it does not
    findings: list[tuple[Configuration, Finding]] = field(default_factory=list)


def token_counts(layout: Layout) -> list[int]:
    """0, 1, one less to one more than the ranks of tp, and 6 times as many as those ranks."""
    n = layout.tp
    return sorted({0, 1, n - 1, n, n + 1, 6 * n})


def coordinates(layout: Layout, tokens: int) -> list[int]:
    """The first and the last rank on every axis, and the first past the last full shard."""
    last = {role: size - 1 for role, size in layout.sizes.items()}
    full_shards = tokens // max(1, -(-tokens // layout.tp))
    ranks = {0, layout.world - 1, min(full_shards, last[TP])}
    for roles in (DENSE, EXPERT):
        ranks.update(layout.rank({role: last[role]}, roles) for role in roles)
    return sorted(ranks)


def configurations(layout: Layout, tokens: Sequence[int] = ()) -> Iterator[Configuration]:
    """All numbers of tokens on rank 0; all coordinates at a few of these numbers."""
    counts = sorted(tokens) or token_counts(layout)
    yield from (Configuration(layout, n) for n in counts)
    uneven = min((n for n in counts if n > layout.tp), default=counts[0])
    few = next((n for n in counts if n), counts[-1])
    for n in sorted({counts[-1], uneven, few}):
        yield from (Configuration(layout, n, rank) for rank in coordinates(layout, n) if rank)


def _traced(target: Target, wanted: Sequence[Configuration], packages: set[str]) -> list[Trace]:
    """Traces in the order of `wanted`. Rank by rank, since making a mesh takes time."""
    found: dict[Configuration, Trace] = {}
    for rank in sorted({c.rank for c in wanted}):
        mine = [c for c in wanted if c.rank == rank]
        with standing(mine[0].layout, rank) as here:
            found.update((c, trace(target, c, packages, here)) for c in mine)
    return [found[c] for c in dict.fromkeys(wanted)]


def _against_whole(
    target: Target, layout: Layout, traces: Sequence[Trace], packages: set[str]
) -> Iterator[tuple[Trace, Finding]]:
    """Another trace beside one process, for views that the shapes of a shard leave open.

    Where dp or cp has several ranks, one process has the tokens of one cell, and other shapes.
    """
    most = max((t.configuration.tokens for t in traces), default=0)
    asking = next((t for t in traces if t.record.asks and t.configuration.tokens == most), None)
    if asking is None or layout.dp * layout.cp > 1:
        return
    try:
        with standing(Layout(), 0) as here:
            alone = trace(target, Configuration(Layout(), most), packages, here)
    except CannotCheckError:  # it does not build in one process
        return
    with standing(layout, asking.configuration.rank) as here:
        again = trace(target, asking.configuration, packages, here, alone.record)
    known = {found.kind for found in asking.findings}
    yield from ((asking, found) for found in again.findings if found.kind not in known)


def check_layout(
    target: Target,
    layout: Layout,
    packages: set[str],
    tokens: Sequence[int] = (),
    value_seconds: float = 0.0,
) -> Result:
    """Trace every configuration of a layout and compare them; inside `signatures(packages)`.

    With `value_seconds`, run all ranks with values too, each time for that long at most.
    """
    result, traces = Result(layout), list[Trace]()
    for found in _traced(target, list(configurations(layout, tokens)), packages):
        if found.refused:
            result.refused = found.refused
            continue
        traces.append(found)
        result.traced += 1
        result.tensors += found.record.tensors
        result.untyped += found.record.untyped
    compared = [*compare(traces), *_against_whole(target, layout, traces, packages)]
    # Where a type depends on the size, that is what is wrong; what fails of it is not shown beside.
    sized = {id(t) for t, f in compared if f.rule == "X12"}
    for found in traces:
        if id(found) not in sized:
            result.findings += [(found.configuration, f) for f in found.findings]
    result.findings += [(t.configuration, f) for t, f in compared]
    if value_seconds and traces:
        for count in {c.configuration.tokens for c in traces if c.configuration.rank}:
            found_values = check_values(target, layout, count, packages, value_seconds)
            result.findings += [(Configuration(layout, count), f) for f in found_values]
    return result
