"""Released versions of frameworks, and what parity must say of them.

    python -m tests.field.released          # runs all and writes the page
    python -m tests.field.released 0.3.0    # runs what has this in its name; keeps other rows

Each version is downloaded once, without its dependencies, into a directory of its own. Bugs that no
release has are put back: a copy of a release in which the lines of the fix are as they were.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "parity_field.md"
ROWS = Path(__file__).with_name("rows.json")
CACHE = Path(os.environ.get("SPMD_MOE_FIELD", Path(tempfile.gettempdir()) / "spmd_moe_field"))
# What packages import besides torch. Older versions of transformers demand an older hub.
HUGGING_FACE = ("tokenizers", "safetensors", "regex", "numpy")
NEEDS = {"deepspeed": ("psutil", "hjson", "py-cpuinfo", "msgpack", "pydantic", "tqdm", "einops")}


@final
@dataclass(frozen=True, slots=True)
class Undo:
    """A fix that is taken back in a copy of a release."""

    file: str
    fixed: str
    broken: str


@final
@dataclass(frozen=True, slots=True)
class Release:
    """One version, one target, one plan; `bug` is what is known to be wrong with it."""

    package: str
    version: str
    block: str
    plan: str = ""
    bug: str = ""
    tensor: str = ""  # of which parity must speak
    right: str = ""  # what parity must say of it, if it knows a correction
    undo: Undo | None = None
    vary: tuple[str, ...] = ()

    @property
    def framework(self) -> str:
        return self.package.partition("-")[0]

    def __str__(self) -> str:
        bug = f"without {self.bug}" if self.undo else ""
        parts = (self.package, self.version, self.block, self.plan, *self.vary, bug)
        return " ".join(filter(None, parts))


GATE = "gradient of mlp.gate.weight", "summed over tp it is right"
ROUTER = "gradient of moe.router.gate.weight", "summed over tp it is right"
INPUT = "gradient of input hidden_states", "averaged over tp it is right"
DOUBLE = "it is 2 times what is right, the size of tp"
HF, TT, MC, DS = "transformers", "torchtitan", "megatron-core", "deepspeed"
_MOE = "megatron/core/transformer/moe"
_FOLDING = "deepspeed/module_inject/auto_ep_folding.py"

_PROBS = "probs = gather_from_sequence_parallel_region(probs, group=self.tp_ep_group)"
NO_GRAD = Undo(
    f"{_MOE}/token_dispatcher.py",
    f"            {_PROBS}\n",
    f"            with torch.no_grad():\n                {_PROBS}\n",
)
Z_LOSS = Undo(
    f"{_MOE}/router.py",
    "self.config.moe_z_loss_coeff / self.tp_cp_group.size()",
    "self.config.moe_z_loss_coeff",
)
_AVERAGE = "ROUTER_GATE_REPLICATED_PARAM:\n        return AUTOEP_FOLDING_GRAD_REDUCE_"
SUMMED = Undo(_FOLDING, f"{_AVERAGE}AVERAGE", f"{_AVERAGE}SUM")
EXPERTS = Undo(
    _FOLDING,
    "            grad_data.div_(tp_world_size)\n        return strategy",
    "            pass\n        return strategy",
)
_ENCODE = "dispatched_input = _sparse_encode(reshaped_input, slots, E, C)"
HIDDEN = Undo("deepspeed/moe/sharded_moe.py", _ENCODE, f"{_ENCODE}.view(E * C, M)")
WEIGHTS = Undo(
    "transformers/distributed/expert_parallel.py",
    "        top_k_weights = _AllReduceBackward.apply(top_k_weights, ep_group)\n",
    "",
)
_LAYOUT = "experts_input_grad_layout = dense_activation_placement(tp=spmd."
PLACED = Undo("torchtitan/models/common/moe_sharding.py", f"{_LAYOUT}P)", f"{_LAYOUT}R)")

# What is broken. Below each, its fixed version is among those that are clean.
BROKEN = [
    Release(HF, "5.16.1", "mixtral", "ep", "#48205", *GATE),
    Release(HF, "5.16.1", "qwen3_moe", "ep", "#48205", *GATE),
    Release(HF, "5.24.0", "mixtral", "all_reduce", "#48205", *GATE, WEIGHTS),
    Release(TT, "0.2.0", "moe", "ep", "#2387", *ROUTER),
    Release(TT, "0.2.1", "moe", "ep", "#2387", *ROUTER),
    Release(TT, "0.2.2", "moe", "ep", "#2387", *ROUTER),
    Release(
        *(TT, "0.3.0", "moe", "tp", "#4054", "gradient of router.gate.weight", ROUTER[1], PLACED),
        vary=("backend=partial_dtensor",),
    ),
    Release(DS, "0.19.5", "autoep", "", "input gradient, mended in 0.19.8", *INPUT),
    Release(DS, "0.19.7", "autoep", "", "input gradient, mended in 0.19.8", *INPUT),
    Release(
        *(DS, "0.19.8", "autoep", "", "averaged router gradient", "gradient of router.gate.weight"),
        *(DOUBLE, SUMMED),
    ),
    Release(
        *(DS, "0.19.8", "autoep", "", "divided expert gradients", "gradient of experts.w1"),
        *(DOUBLE, EXPERTS),
    ),
    Release(DS, "0.19.8", "moe", "", "#8195", "output result", "", HIDDEN),
    Release(MC, "0.16.1", "moe", "allgather", "b6ce1938", "gradient of router.weight", "", NO_GRAD),
    Release(
        *(MC, "0.16.1", "moe", "alltoall", "scale of z loss", "gradient of router.weight", ""),
        *(Z_LOSS, ("loss=z_loss",)),
    ),
]
CLEAN = [
    Release(HF, "5.16.1", "mixtral", "tp"),
    Release(HF, "5.24.0", "mixtral", "all_reduce"),
    Release(HF, "5.24.0", "mixtral", "all_to_all"),
    Release(HF, "5.24.0", "mixtral", "tp"),
    Release(HF, "5.24.0", "qwen3_moe", "all_to_all"),
    Release(HF, "5.24.0", "deepseek_v3", "all_to_all"),
    Release(HF, "5.24.0", "gpt_oss", "all_to_all"),
    Release(TT, "0.2.2", "moe", "tp"),
    Release(TT, "0.3.0", "moe", "ep", vary=("sp=True,False",)),
    Release(TT, "0.3.0", "moe", "tp", vary=("backend=spmd_types,partial_dtensor",)),
    Release(DS, "0.19.8", "moe", vary=("top_k=1,2,4",)),
    Release(DS, "0.19.8", "autoep", vary=("top_k=1,2,4",)),
    Release(MC, "0.16.1", "moe", "allgather", vary=("etp=False,True",)),
    Release(MC, "0.16.1", "moe", "alltoall", vary=("etp=False,True",)),
    Release(MC, "0.16.1", "moe", "alltoall", vary=("loss=aux_loss,seq_aux_loss,z_loss",)),
]
RELEASES = BROKEN + CLEAN


def fetched(release: Release) -> str:
    """The directories to import from, downloaded where they are not there."""
    name = f"{release.package}-{release.version}"
    folder = _install(name, "--no-deps", f"{release.package}=={release.version}")
    folders = [folder if release.undo is None else _without(folder, release.undo)]
    if release.package == HF:
        old = int(release.version.split(".")[1]) < 18
        hub = "huggingface_hub<2" if old else "huggingface_hub>=2"
        folders.append(_install(f"hub-{'1' if old else '2'}", hub, *HUGGING_FACE))
    if release.package in NEEDS:
        folders.append(_install(f"{release.package}-needs", *NEEDS[release.package]))
    return os.pathsep.join(map(str, folders))


def _install(name: str, *wanted: str) -> Path:
    folder = CACHE / name
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *wanted]
        subprocess.run(pip, check=True)
    return folder


def _without(folder: Path, undo: Undo) -> Path:
    """A copy of the release, of hard links, except for one file."""
    copy = CACHE / "undone" / folder.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        folder, copy, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__")
    )
    text = (folder / undo.file).read_text()
    assert text.count(undo.fixed) == 1, f"{undo.file} has not once the lines of the fix"
    (copy / undo.file).unlink()
    (copy / undo.file).write_text(text.replace(undo.fixed, undo.broken))
    return copy


def report(release: Release, *words: str) -> dict[str, Any]:
    """What parity says, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "spmd_moe", "parity", "--json"]
    command += [f"{release.framework}:{release.block}", "--path", fetched(release), *words]
    command += ["--plan", release.plan] if release.plan else []
    command += [word for each in release.vary for word in ("--vary", each)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=580)
    begin = run.stdout.find("{")  # some frameworks print
    if begin < 0:
        raise RuntimeError(f"{release}: {run.stderr}")
    found: dict[str, Any] = json.loads(run.stdout[begin:])
    return found


def as_due(release: Release, found: dict[str, Any]) -> bool:
    """What is broken is found, with its correction; what is clean is compared, and no more."""
    compared = [run for run in found["runs"] if run["compared"]]
    if not compared or any(run["zero"] >= run["compared"] / 2 for run in compared):
        return False
    if not release.bug:
        return found["status"] == 0 and not found["findings"]
    told = [f for f in found["findings"] if release.tensor in f["tensors"]]
    return found["status"] == 1 and any(
        f["right"] == release.right or not release.right for f in told
    )


# --- the page -----------------------------------------------------------------------------------


def broken_row(release: Release, found: dict[str, Any]) -> str:
    first = next(f for f in found["findings"] if release.tensor in f["tensors"])
    said = f"{', '.join(first['tensors'][:2])}: {first['right'] or 'no correction'}"
    kind = "fix taken back" if release.undo else "released"
    block = " ".join(filter(None, (release.block, release.plan, *release.vary)))
    cells = [release.package, release.version, block, f"{release.bug}, {kind}", said]
    cells += [first["in"][0], f"{found['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def clean_row(release: Release, found: dict[str, Any]) -> str:
    runs = [run for run in found["runs"] if run["compared"]]
    block = " ".join(filter(None, (release.block, release.plan, *release.vary)))
    alike = (release.package, release.version, release.block)
    same = [b for b in BROKEN if b.undo and (b.package, b.version, b.block) == alike]
    tensors = sum(run["compared"] for run in runs)
    cells = [release.package, release.version, block, str(len(runs)), str(tensors)]
    cells += [str(len(same)), f"{found['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def page(rows: Mapping[str, str]) -> Iterator[str]:
    yield "# Parity on released code\n"
    yield "Written by `python -m tests.field.released`: all layouts of up to 4 ranks.\n"
    yield "## Bugs that it finds\n"
    yield "| package | version | block | bug | parity says | first in | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    yield from (rows[str(r)] for r in BROKEN if str(r) in rows)
    yield "\n## Runs without a finding\n"
    yield "Mutants are the bugs above for which a fix is taken back in the same block.\n"
    yield "| package | version | block | layouts | tensors | mutants | seconds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    yield from (rows[str(r)] for r in CLEAN if str(r) in rows)


def main(*words: str) -> None:
    """Run the releases that have one of the words in their name, or all; keep the other rows."""
    rows: dict[str, str] = json.loads(ROWS.read_text()) if ROWS.is_file() else {}
    for release in RELEASES:
        if words and not any(word in str(release) for word in words):
            continue
        found = report(release)
        if not as_due(release, found):
            raise RuntimeError(f"{release}: {found['findings']}")
        rows[str(release)] = (broken_row if release.bug else clean_row)(release, found)
        print(rows[str(release)], flush=True)
        ROWS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        PAGE.write_text("\n".join(page(rows)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
