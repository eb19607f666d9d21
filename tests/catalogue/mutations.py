"""Every move, sum, exchange, scale and annotation of the layer changed by a program; who notices?

python -m tests.catalogue.mutations                 # all of them: about a quarter of an hour
python -m tests.catalogue.mutations --only losses   # of one file
python -m tests.catalogue.mutations --write         # and write the page of survivors

Each mutant is one changed place. It goes to the traced check, on a layout whose axes all have other
ranks, then to the check with values, until one of them objects. What both let pass is a survivor:
equal to the original, beyond both checks, or a hole in them. The page says which.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from spmd_moe.check import CannotCheckError, Layout, examine
from tests.catalogue.code import Edit, changed, source_of

FILES = [
    "router",
    "boundary",
    "losses",
    "shared",
    "experts",
    "combine",
    "moe",
    "dispatch.all_to_all",
    "dispatch.all_gather",
]
TARGETS = "tests.catalogue.mutated"
LAYOUT = Layout(dp=2, tp=4, ep=2, etp=2)
PAGE = Path(__file__).parent / "MUTATIONS.md"

# Annotations become another that is as long: the kinds differ, the tensor does not.
RETYPED = {
    "Tokens": "TokenSums",
    "Whole": "Tokens",
    "Rows": "RowSums",
    "RowSums": "Rows",
    "GatheredRows": "Rows",
    "AllTokens": "Rows",
    "RouterWeight": "Whole",
    "SharedWeight": "Whole",
    "TokenSums": "Tokens",
}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    how: str
    old: str
    new: str
    start: int
    end: int

    def edit(self) -> Edit:
        module = f"spmd_moe.{self.file}"
        source = source_of(module)
        text = source[: self.start] + self.new + source[self.end :]
        names = {"TokenSums", "Tokens", "Rows", "RowSums", "Whole"}
        used = {n.id for n in ast.walk(ast.parse(self.new)) if isinstance(n, ast.Name)} & names
        head = "from spmd_moe.placement import " + ", ".join(sorted(used)) if used else ""
        marker = "from __future__ import annotations\n"
        return Edit(module, source, text.replace(marker, f"{marker}{head}\n", 1))

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line} {self.how}: {old} -> {new}"


# --- making them --------------------------------------------------------------------------------


def mutants(file: str) -> Iterator[Mutant]:
    source = source_of(f"spmd_moe.{file}")
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]

    def place(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            starts[node.lineno - 1] + node.col_offset,
            starts[node.end_lineno - 1] + node.end_col_offset,
        )

    for node in ast.walk(ast.parse(source)):
        found = (
            _of_call(node)
            if isinstance(node, ast.Call)
            else _of_scale(node)
            if isinstance(node, ast.BinOp)
            else []
        )
        for how, new in found:
            start, end = place(node)  # type: ignore[arg-type]  # both kinds are expressions
            yield Mutant(file, node.lineno, how, source[start:end], new, start, end)  # type: ignore[attr-defined]  # as above
        if isinstance(node, ast.FunctionDef):
            for arg in [*node.args.args, *node.args.kwonlyargs]:
                yield from _retyped(file, source, arg.annotation, place)
            yield from _retyped(file, source, node.returns, place)
        if isinstance(node, ast.AnnAssign):
            yield from _retyped(file, source, node.annotation, place)


def _retyped(
    file: str, source: str, annotation: ast.expr | None, place: object
) -> Iterator[Mutant]:
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name) and node.id in RETYPED:
            start, end = place(node)  # type: ignore[operator]  # a function of `mutants`
            new = RETYPED[node.id]
            yield Mutant(file, node.lineno, "retyped", source[start:end], new, start, end)


def _of_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    first = ast.unparse(call.args[0]) if call.args else ""
    keys = {k.arg: k for k in call.keywords}
    if name == "redistribute":
        yield "removed", first
        src, dst = ast.unparse(keys["src"].value), ast.unparse(keys["dst"].value)
        for new_src, new_dst in _other_kinds(src, dst):
            yield "other kinds", _with(call, src=new_src, dst=new_dst)
        for axis in ("self.tp", "self.ep", "self.etp"):
            if ast.unparse(call.args[1]) in ("self.tp", "self.ep", "self.etp"):
                yield "other axis", _with(call, axis=axis)
        if "dtype" in keys or "grad_dtype" in keys:
            return
    if name in ("declare_sum", "declared"):
        yield "removed", first
    if name == "exchange":
        yield "removed", first
        swapped = {"sends": "receives", "receives": "sends"}
        both = {k: ast.unparse(keys[other].value) for k, other in swapped.items()}
        yield "sent back", _with(call, **both)
    if name in ("reduce_on_tp", "count_in_backward"):
        yield "removed", first


def _other_kinds(src: str, dst: str) -> Iterator[tuple[str, str]]:
    yield dst, src
    for kind in ("R", "I", "P", "S(0)"):
        if kind != dst:
            yield src, kind
        if kind != src:
            yield kind, dst


def _with(call: ast.Call, **new: str) -> str:
    copy = ast.parse(ast.unparse(call), mode="eval").body
    assert isinstance(copy, ast.Call)
    if "axis" in new:
        copy.args[1] = ast.parse(new.pop("axis"), mode="eval").body
    for keyword in copy.keywords:
        if keyword.arg in new:
            keyword.value = ast.parse(new[keyword.arg], mode="eval").body
    return ast.unparse(copy)


def _of_scale(node: ast.BinOp) -> Iterator[tuple[str, str]]:
    if isinstance(node.op, ast.Div):
        yield "not divided", ast.unparse(node.left)
    if isinstance(node.op, ast.Mult):
        yield "not multiplied", ast.unparse(node.left)


# --- looking at them ----------------------------------------------------------------------------


def verdict(mutant: Mutant) -> str:
    """Which check objects, by which rule; 'survived' where none does."""
    if mutant.old.split() == mutant.new.split():
        return "the same"
    edit = mutant.edit()
    try:
        ast.parse(edit.new)
        with changed("mutant", [edit], TARGETS) as code:
            for values in (False, True):
                for target in code.ALL:
                    try:
                        report = examine(target, chosen=[LAYOUT], tokens=(1, 9), values=values)
                    except CannotCheckError as error:
                        return f"refused: {str(error).splitlines()[0][:60]}"
                    if not report.ok:
                        rule = report.mistakes()[0].finding.rule
                        return f"{'values' if values else 'traced'} {rule}"
    except Exception as error:  # a module that cannot even be imported
        return f"refused: {type(error).__name__}"
    return "survived"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=FILES, help="mutants of one file")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [
        m for file in FILES if args.only in (None, file) for m in dict.fromkeys(mutants(file))
    ]
    begin, results = time.monotonic(), list[tuple[Mutant, str]]()
    for number, mutant in enumerate(chosen, 1):
        results.append((mutant, verdict(mutant)))
        said = f"{number}/{len(chosen)} {time.monotonic() - begin:5.0f} s"
        print(f"{said} {results[-1][1]:<14} {mutant}", flush=True)
    counted = [(m, v) for m, v in results if v != "the same"]
    survivors = [m for m, v in counted if v == "survived"]
    print(f"{len(counted)} mutants, {len(survivors)} survived")
    if args.write:
        PAGE.write_text(page(counted))


PAGE_TEXT = """\
# Mutants of the layer, and the check that objects

One place of the layer is changed at a time, by `python -m tests.catalogue.mutations --write`: moves
and sums left out, on other kinds or another axis, exchanges sent back, factors left out,
annotations retyped. {counted} mutants: {traced} are found by the traced check, {values} more by the
check with values, {refused} cannot be built, {survived} survive.

{table}
"""


def page(counted: list[tuple[Mutant, str]]) -> str:
    def of(start: str) -> int:
        return sum(v.startswith(start) for _, v in counted)

    rows = [f"- `{m}`".replace("|", "/") for m, v in counted if v == "survived"]
    return PAGE_TEXT.format(
        counted=len(counted),
        traced=of("traced"),
        values=of("values"),
        refused=of("refused"),
        survived=of("survived"),
        table="\n".join(["## Survivors", "", *rows]),
    )


if __name__ == "__main__":
    main()
