"""The recipes of CONTRIBUTING.md, applied to a copy of the package: each change is complete.

Each test makes the edits that the recipe names, in at most three code files, and runs the result in
a new process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docs_blocks import ROOT

pytestmark = pytest.mark.slow

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package and of the tests."""
    for folder in ("spmd_moe", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    return tmp_path


def recipe(title: str) -> str:
    """A section of the guide."""
    found: list[str] = re.findall(rf"^### {re.escape(title)}\n(.*?)(?=^##)", GUIDE, re.M | re.S)
    return found[0]


def edit(file: Path, text: str, *changes: tuple[str, str]) -> None:
    """Replace words of a file that the recipe `text` names."""
    assert str(file.name) in text, f"the recipe does not name {file.name}"
    source = file.read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{file.name} has changed: {old!r}"
        source = source.replace(old, new)
    file.write_text(source)


def run(copy: Path, program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SCORE = """
import torch
from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from tests.support.layer_oracle import scores_of
config, mesh = RouterConfig(4, top_k=2, score_func="sigmoid_squared"), MoEMesh.single()
layer = MoE(MoEConfig(8, 16, config), mesh)
init_weights(layer, mesh, seed=0, std=1.0)
x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
seen = []
layer.router.register_forward_hook(lambda module, args, out: seen.append(out))
layer(x).hidden.sum().backward()
for token, logits in enumerate(x @ layer.router.weight_ED.detach().T):
    best = scores_of(logits, config.score_func).topk(2)
    assert seen[0].expert_ids_TK[token].tolist() == best.indices.tolist()
    assert torch.allclose(seen[0].scores_TK[token], best.values, atol=1e-5)
assert layer.router.weight_ED.grad.abs().max() > 0
"""


def test_a_new_score_function(copy: Path) -> None:
    text = recipe("A new score function")
    edit(
        copy / "spmd_moe/layer/router_scores.py",
        text,
        (
            '"softmax_chosen", "sigmoid", "sqrt_softplus"]',
            '"softmax_chosen", "sigmoid", "sqrt_softplus", "sigmoid_squared"]',
        ),
        (
            '    "sqrt_softplus": Score(',
            '    "sigmoid_squared": Score(_sigmoid_squared, _log_sigmoid_squared),\n'
            '    "sqrt_softplus": Score(',
        ),
        (
            "SCORES: dict[str, Score] = {",
            "def _sigmoid_squared(x: Tokens) -> Tokens:\n    return torch.sigmoid(x).square()\n\n\n"
            "def _log_sigmoid_squared(x: Tokens) -> Tokens:\n    return 2 * F.logsigmoid(x)\n\n\n"
            "SCORES: dict[str, Score] = {",
        ),
    )
    edit(
        copy / "tests/support/layer_oracle.py",
        text,
        (
            '        "sigmoid": logits',
            '        "sigmoid_squared": logits.sigmoid() ** 2,\n        "sigmoid": logits',
        ),
    )
    run(copy, SCORE)


INSIDE = """\
from spmd_moe.core.collectives import exchange
from spmd_moe.core.mesh import Axis, MoEMesh
from spmd_moe.core.placement import EP, ETP, R, S
from spmd_moe.core.redistribute import redistribute
from spmd_moe.layer.router import Routing
"""

DISPATCHER = """
import torch
from spmd_moe import MoE, MoEConfig, MoEMesh, RouterConfig, init_weights
from spmd_moe.layer.dispatch import Padded
from tests.support.dispatchers import DISPATCHERS
mesh = MoEMesh.single()
config = MoEConfig(8, 16, RouterConfig(4, top_k=2))
x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
results = []
assert DISPATCHERS["padded"] is Padded
for dispatcher in (None, Padded(mesh, 4)):
    layer = MoE(config, mesh, dispatcher)
    init_weights(layer, mesh, seed=0, std=1.0)
    results.append(layer(x).hidden)
assert torch.equal(*results)
"""


def test_a_new_dispatcher(copy: Path) -> None:
    """The one of `test_dispatch_outside.py`, moved into the package."""
    text = recipe("A new dispatcher")
    source = (copy / "tests/layer/test_dispatch_outside.py").read_text()
    head, _, rest = source.partition("@final\n@dataclass")
    end = re.search(r"^(def |@pytest|# ---|[A-Z_]+ = |[A-Z_]+: )", rest, re.M)
    assert end is not None
    body = rest[: end.start()]
    outside = re.compile(r"pytest|tests\.|spmd_moe\.check")
    lines = [line for line in head.splitlines() if not outside.search(line)]
    made = "\n".join(lines) + "\n\n@final\n@dataclass" + body
    # Inside the package names come from their own modules.
    made = re.sub(r"from spmd_moe import \(.*?\)\n", INSIDE, made, count=1, flags=re.S)
    made = made.replace(
        "spmd_moe.layer.dispatch import Arrived", "spmd_moe.layer.dispatch.protocol import Arrived"
    )
    (copy / "spmd_moe/layer/dispatch/padded.py").write_text(made)
    edit(
        copy / "spmd_moe/layer/dispatch/__init__.py",
        text,
        (
            "from spmd_moe.layer.dispatch.local import Local as Local\n",
            "from spmd_moe.layer.dispatch.local import Local as Local\n"
            "from spmd_moe.layer.dispatch.padded import Padded as Padded\n",
        ),
    )
    edit(
        copy / "tests/support/dispatchers.py",
        text,
        ("    Local,\n", "    Local,\n    Padded,\n"),
        ('    "dedup": Dedup', '    "padded": Padded,\n    "dedup": Dedup'),
    )
    run(copy, DISPATCHER)


OPERATOR = """
import torch
from spmd_types import _checker
spec = _checker._OP_REGISTRY[torch.flip]
assert torch.tril not in _checker._OP_REGISTRY  # as a newer release of spmd_types would have it
_checker._OP_REGISTRY[torch.tril] = spec
from spmd_moe.static import operator_rules
from spmd_moe.tooling import write_ops_json
sums = [operator_rules.Operand(0, {"TP": "P"})]
assert operator_rules.infer_operation("torch.tril", sums)[1] is not None
operator_rules.TABLE_FILE.write_text(write_ops_json.text())
operator_rules.table.cache_clear()
assert operator_rules.infer_operation("torch.tril", sums) == ({"TP": "P"}, None)
"""


def test_a_new_operator_in_the_static_table(copy: Path) -> None:
    assert "spmd_moe.tooling.write_ops_json --write" in recipe("A new operator in the static table")
    before = (copy / "spmd_moe/static/ops.json").read_text()
    run(copy, OPERATOR)
    after = (copy / "spmd_moe/static/ops.json").read_text()
    new = set(after.splitlines()) - set(before.splitlines())
    assert new and all("tril" in line for line in new)


RULE = """
from spmd_moe.check import Layout, run_checks
from spmd_moe.check.rules import rules_text
from tests.support.faulty_targets import frozen, of, shared_out
assert "X13" in rules_text()
chosen = [Layout(dp=2, tp=2)]
found = run_checks(frozen, chosen=chosen).mistakes()
assert {mistake.finding.rule for mistake in found} == {"X13"}, [str(m) for m in found]
assert "weight is frozen" in str(found[0]) and "fix: self.weight.requires_grad_()" in str(found[0])
assert not run_checks(of(shared_out), chosen=chosen).mistakes()
"""


def test_a_new_rule(copy: Path) -> None:
    """X13, made up: no parameter is frozen."""
    text = recipe("A new rule of the traced check")
    row = (
        '    Rule("X13", "trainable", "no parameter is frozen", ("traced",)),\n'
        ")\nRULES: dict[str, Rule]"
    )
    edit(copy / "spmd_moe/check/rules.py", text, (")\nRULES: dict[str, Rule]", row))
    found = (
        "        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:\n"
        '            what, fix = f"{name} is frozen", f"self.{name}.requires_grad_()"\n'
        '            yield finding("X13", name, "Module", what, "it never learns", fix)\n'
        "        missing = unsaid(placement, mesh)\n"
    )
    edit(
        copy / "spmd_moe/check/check_declarations.py",
        text,
        ("        missing = unsaid(placement, mesh)\n", found),
    )
    broken = (
        "def frozen(mesh: MoEMesh, tokens: int) -> Case:\n"
        "    case = of(shared_out)(mesh, tokens)\n"
        "    return Case(case.module.requires_grad_(False), case.args, case.placements)\n\n\n"
        "def shared_out(m: Module, x: Tensor) -> Tensor:\n"
    )
    edit(
        copy / "tests/support/faulty_targets.py",
        text,
        ("def shared_out(m: Module, x: Tensor) -> Tensor:\n", broken),
    )
    run(copy, RULE)


def test_recipes_name_files_that_exist_and_few_of_them() -> None:
    for title in re.findall(r"^### (.*)", GUIDE, re.M):
        steps = re.findall(r"^(\d)\. ", recipe(title), re.M)
        assert steps == ["1", "2", "3"], title
        for name in re.findall(
            r"`((?:spmd_moe|tests|docs|typecheck|check)/[\w./]+)`", recipe(title)
        ):
            found = (ROOT / name).exists() or (ROOT / "spmd_moe" / name).exists()
            assert found, f"{title}: {name} does not exist"
