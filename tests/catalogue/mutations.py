"""Which check objects to which mutant of the layer (`mutants.py`), if any does?

python -m tests.catalogue.mutations                 # all of them, on two cores: half an hour
python -m tests.catalogue.mutations --only losses   # of one file
python -m tests.catalogue.mutations --write         # all, and write the page
python -m tests.catalogue.mutations --write --new   # what it has not yet, or has as survivors

Each mutant goes to mypy with the plugin, and to the traced check; to the check with values, which
takes longer, only if both let it pass. What is left is wrong on one process as it is on many, which
is no business of these checks, or not wrong at all: it goes to the layer's own tests. What passes
those too is a survivor, and `survivors.py` says why it is no hole.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import torch

from spmd_moe.check import CannotCheckError, Layout, run_checks
from tests.catalogue.code import ROOT, changed, source_of
from tests.catalogue.mutants import FILES, Mutant, mutants
from tests.catalogue.survivors import ARGUED

LAYOUT = Layout(dp=2, tp=4, ep=2, etp=2)  # groups of tp, ep and etp are never the same ranks
LAYOUT_OF = {"dispatch.local": Layout(dp=2, tp=4)}  # it is for ranks that have all experts
TOKENS = (1, 9)  # of the traced check; with values, the larger
PAGE = Path(__file__).parent / "MUTATIONS.md"
RATES = ROOT / "docs" / "benchmarks.md"
PASSED = "-"
# Which tests know best what a file computes.
TESTS_OF = {
    "router_logits": "router misuse moe",
    "router": "router_choices router_ranks router errors balance_losses",
    "boundary": "misuse moe",
    "balance_losses": "balance_losses errors",
    "selection_bias": "counters errors",
    "expert_load": "routing_faults",
    "shared_experts": "errors moe",
    "experts": "router_choices errors experts moe",
    "combine": "dispatch moe",
    "moe": "router_choices moe_output errors misuse counters balance_losses refused_inputs moe",
    "dispatch.local": "errors misuse dispatch",
    "dispatch.ragged_exchange": "dedup routing_faults dispatch",
    "dispatch.dedup_all_to_all": "dedup dispatch",
    "dispatch.all_to_all": "errors routing_faults dispatch",
    "dispatch.all_gather": "errors routing_faults dispatch",
    "dispatch.fixed_capacity": "errors dispatch decode",
}


def test_file(name: str) -> str:
    """`tests/test_errors.py` is about the whole package; the others are of the layer."""
    return "tests/test_errors.py" if name == "errors" else f"tests/layer/test_{name}.py"


def by_mypy(chosen: Sequence[Mutant]) -> dict[str, str]:
    """The code of the first error of the plugin's, of each mutant; one run for all."""
    from tests.static.test_typecheck import mypy  # it needs pytest, which what follows does not

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, mutant in enumerate(chosen):
            (folder / f"mutant_{number:03}.py").write_text(mutant.source())
        for file in FILES:  # as they are, they are right
            copy = folder / f"mutant_{file.replace('.', '_')}.py"
            copy.write_text(source_of(f"spmd_moe.layer.{file}"))
        config = folder / "pyproject.toml"
        settings = (ROOT / "pyproject.toml").read_text()
        config.write_text(settings.replace("\nstrict = [", '\nstrict = ["mutant_*",', 1))
        said = mypy("--config-file", config, *sorted(folder.glob("*.py")))
    found = dict(reversed(re.findall(r"mutant_(\w+)\.py:\d+: error: .*\[(placement-\w+)\]", said)))
    wrong = [file for file in FILES if file.replace(".", "_") in found]
    assert not wrong, f"reported as they are: {wrong}"
    return {m.name: found.get(f"{number:03}", PASSED) for number, m in enumerate(chosen)}


def by_running(mutant: Mutant, with_values: bool) -> str:
    """Which check objects, by which rule."""
    edit, layout = mutant.edit(), LAYOUT_OF.get(mutant.file, LAYOUT)
    try:
        ast.parse(edit.new)
        with changed("mutant", [edit], "tests.catalogue.mutated") as code:
            wanted = code.USED_BY.get(mutant.file, tuple(code.TARGETS))
            for values in (False, True)[: 1 + with_values]:
                for name in wanted:
                    tokens = TOKENS[-1:] if values else TOKENS
                    report = run_checks(
                        code.TARGETS[name], chosen=[layout], tokens=tokens, values=values
                    )
                    if not report.ok:
                        rule = report.mistakes()[0].finding.rule
                        return f"{'values' if values else 'traced'} {rule}"
    except CannotCheckError as error:
        return f"refused: {str(error).splitlines()[0][:60]}"
    except Exception as error:  # a module that cannot even be imported
        return f"refused: {type(error).__name__}"
    return PASSED


def by_tests(mutant: Mutant) -> str:
    """The first of the layer's own tests to fail, in a copy of the repository."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for folder in ("spmd_moe", "tests", "examples"):
            shutil.copytree(ROOT / folder, copy / folder)
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / f"{mutant.module.replace('.', '/')}.py").write_text(mutant.source())
        words = ["-x", "-q", "-m", "not long", "-p", "no:cacheprovider"]
        words += [test_file(test) for test in TESTS_OF[mutant.file].split()]
        command = [sys.executable, "-m", "pytest", *words]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode == 0:
        return PASSED
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    assert failed, f"{mutant}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return f"tests {failed[1]}"


def _told(asked: tuple[Mutant, bool]) -> tuple[str, str]:
    torch.set_num_threads(1)
    mutant, alive = asked
    found = by_running(mutant, alive)
    survives = alive and found == PASSED and mutant.name not in ARGUED
    return mutant.name, by_tests(mutant) if survives else found


def _check_as_it_is(file: str) -> None:
    """What objects to the layer itself would object to every mutant."""
    with changed("unchanged", [], "tests.catalogue.mutated") as code:
        for name in code.USED_BY.get(file, tuple(code.TARGETS)):
            layout = LAYOUT_OF.get(file, LAYOUT)
            report = run_checks(code.TARGETS[name], chosen=[layout], tokens=TOKENS)
            assert report.ok, f"as it is, {name} is reported: {report.mistakes()[0].finding}"


def verdicts(chosen: Sequence[Mutant], jobs: int) -> dict[str, tuple[str, str]]:
    """Of mypy, and of the checks that run, by the mutant's name; says what it is at."""
    for file in {mutant.file for mutant in chosen}:
        _check_as_it_is(file)
    print(f"{len(chosen)} mutants. mypy ...", flush=True)
    static, found = by_mypy(chosen), dict[str, tuple[str, str]]()
    begin, by_name = time.monotonic(), {m.name: m for m in chosen}
    with get_context("spawn").Pool(jobs) as pool:
        asked = [(m, static[m.name] == PASSED) for m in chosen]
        for number, (name, run) in enumerate(pool.imap_unordered(_told, asked), 1):
            found[name] = static[name], run
            said = f"{number}/{len(chosen)} {time.monotonic() - begin:5.0f} s"
            print(f"{said} {static[name]:<21} {run:<14} {by_name[name]}", flush=True)
    return {m.name: found[m.name] for m in chosen}


# --- the page -----------------------------------------------------------------------------------

PAGE_TEXT = """\
# Mutants of the layer, and the check that objects

One place of the layer is changed at a time, by `python -m tests.catalogue.mutations --write`: moves
and sums left out, turned round, to other kinds or on another axis; exchanges left out or sent back;
factors left out; annotations retyped. {date}:

{rates}

## Survivors

{survivors}

## All

{rows}
"""


def page(chosen: Sequence[Mutant], found: Mapping[str, tuple[str, str]], today: str) -> str:
    survivors = [m for m in chosen if found[m.name] == (PASSED, PASSED)]
    said = [
        f"- `{' '.join(str(m).split())}`: {ARGUED.get(m.name, 'NOT ARGUED')}" for m in survivors
    ]
    rows = [f"| {m.name} | {' | '.join(found[m.name])} |" for m in chosen]
    head = ["| mutant | mypy | run |", "| --- | --- | --- |"]
    return PAGE_TEXT.format(
        date=today,
        rates=rates(list(found.values())),
        survivors="\n".join(said),
        rows="\n".join([*head, *rows]),
    )


def rates(found: Sequence[tuple[str, str]]) -> str:
    by_run = Counter(run.split()[0].rstrip(":") for _, run in found)
    static = sum(code != PASSED for code, _ in found)
    every = sum(pair != (PASSED, PASSED) for pair in found)
    lines = [
        ("mypy with the plugin, before anything runs", static),
        ("the traced check", by_run["traced"] + by_run["refused"]),
        ("of these, a program that cannot be built or run at all", by_run["refused"]),
        ("the check with values, of what both let pass", by_run["values"]),
        ("the layer's own tests, of what all of these let pass", by_run["tests"]),
        ("any of them", every),
    ]
    table = [f"| {what} | {n} | {n / len(found):.0%} |" for what, n in lines]
    head = f"| {len(found)} mutants; reported by | | |"
    return "\n".join([head, "| --- | --- | --- |", *table])


def written() -> dict[str, tuple[str, str]]:
    """What the page says of each mutant."""
    rows = re.findall(r"^\| (\S+:.*?) \| (\S+) \| (.+) \|$", PAGE.read_text(), re.M)
    return {name: (static, run) for name, static, run in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=FILES, help="mutants of one file")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--new", action="store_true", help="the rest is as the page says")
    args = parser.parse_args()
    if args.write and args.only:
        parser.error("--write is of all mutants: leave out --only")
    every = [m for file in FILES if args.only in (None, file) for m in mutants(file)]
    known = written() if args.new else {}
    known = {name: found for name, found in known.items() if found != (PASSED, PASSED)}
    known |= verdicts([m for m in every if m.name not in known], args.jobs)
    found = {m.name: known[m.name] for m in every}
    table = rates(list(found.values()))
    print(table)
    if args.write:
        PAGE.write_text(page(every, found, date.today().isoformat()))
        text = RATES.read_text()
        RATES.write_text(re.sub(r"\| \d+ mutants;.*?(?=\n\n)", table, text, flags=re.S))
        print(f"{PAGE} and the rates in {RATES} are written")


if __name__ == "__main__":
    main()
