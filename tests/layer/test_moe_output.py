"""What the layer returns is a record, and passes through what stands between layers: checkpoints,
FSDP, torch.compile.
"""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_map,
    tree_unflatten,
)
from torch.utils.checkpoint import checkpoint

from spmd_moe.check.thread_ranks import threaded
from spmd_moe.core.errors import OutputError
from spmd_moe.core.mesh import MoEMesh
from spmd_moe.core.placement import DP, I, Kind, R, S
from spmd_moe.layer.balance_losses import LossTerms, Totals, balance_loss, reduce_loss_terms, z_loss
from spmd_moe.layer.moe import MoE, MoEOutput
from spmd_moe.layer.moe_config import MoEConfig
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.train.init_weights import init_weights
from tests.support.workers import run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = MoEConfig(8, 12, RouterConfig(4, top_k=2), balance="batch")
TOKENS = 10
# Dynamo makes an object of every autograd function that it traces, which torch itself warns of.
OF_DYNAMO = "ignore:.*should not be instantiated:DeprecationWarning"


class Block(nn.Module):
    """A layer of a model: norm, MoE, and the way around them; gives the whole record on."""

    def __init__(self, mesh: MoEMesh) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CONFIG.dim)
        self.moe = MoE(CONFIG, mesh)
        init_weights(self.moe, mesh, seed=3, std=0.5)

    def forward(self, x: Tensor) -> MoEOutput:
        out: MoEOutput = self.moe(self.norm(x))
        return replace(out, hidden=x + out.hidden)


def tokens(rank: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn((TOKENS, CONFIG.dim), generator=generator).requires_grad_()


def loss_of(out: MoEOutput, mesh: MoEMesh) -> Tensor:
    """Of all that is in the record."""
    assert out.losses is not None
    total = reduce_loss_terms(out.losses, mesh)
    aux = balance_loss(out.losses, total, mesh) + z_loss(out.losses, total)
    return out.hidden.square().mean() + aux


def gradients(block: Block) -> dict[str, Tensor]:
    return {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def wanted(ranks: int = 1) -> dict[str, Tensor]:
    """The gradients of the plain block, for the tokens of all ranks."""
    mesh = MoEMesh.single()
    block = Block(mesh)
    x = torch.cat([tokens(r) for r in range(ranks)])
    loss_of(block(x), mesh).backward()
    found = gradients(block)
    assert found.keys() == dict(block.named_parameters()).keys()
    assert all(g.abs().max() > 1e-6 for g in found.values())
    return found


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)


# --- a tree of tensors ------------------------------------------------------------------------


def test_the_record_is_a_tree() -> None:
    mesh = MoEMesh.single()
    out = Block(mesh)(tokens())
    clone = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, out)
    assert isinstance(clone, MoEOutput) and isinstance(clone.losses, LossTerms)
    leaves, spec = tree_flatten(out)
    assert sum(isinstance(leaf, Tensor) for leaf in leaves) == 7
    back = tree_unflatten(leaves, spec)
    assert back.hidden is out.hidden and back.losses.z_sum is out.losses.z_sum
    assert back.losses.by_sequence is False and back.losses.whole_on_tp is False
    total = tree_map(lambda v: v, reduce_loss_terms(out.losses, mesh))
    assert isinstance(total, Totals) and total.tokens == TOKENS


def test_the_record_without_losses_is_a_tree() -> None:
    layer = MoE(replace(CONFIG, balance=None), MoEMesh.single())
    init_weights(layer, layer.mesh, seed=0)
    out = tree_map(torch.zeros_like, layer(tokens()))
    assert out.losses is None and out.counts_E.tolist() == [0] * 4


def block_output() -> Any:
    return Block(MoEMesh.single())(tokens())


USES: dict[str, Callable[[Any], object]] = {
    "torch's add": lambda out: tokens() + out,
    "torch's sub": lambda out: torch.sub(tokens(), out),
    "torch's linear": nn.Sequential(nn.Linear(8, 4)),
    "torch's layer_norm": nn.LayerNorm(8),
    "torch's cat": lambda out: torch.cat([tokens(), out]),
    "`+`": lambda out: out + 1.0,
    "`*`": lambda out: 2 * out,
    "`@`": lambda out: out @ tokens().T,
    "`[]`": lambda out: out[0],
    "`.sum`": lambda out: out.sum(),
    "`.shape`": lambda out: out.shape,
}


@pytest.mark.parametrize("use", USES)
def test_the_record_used_as_a_tensor_names_hidden(use: str) -> None:
    out = block_output()
    with pytest.raises(OutputError) as raised:
        USES[use](out)
    first, *_, fix, at = str(raised.value).splitlines()
    assert first == f"MoE.forward: the result is an MoEOutput, but {use} needs a tensor."
    assert (".hidden" in fix and "test_moe_output.py" in at) or "torch" in at


def test_names_that_no_tensor_has_are_missing_as_from_any_object() -> None:
    out = block_output()
    with pytest.raises(AttributeError, match="'MoEOutput' object has no attribute 'hiden'") as got:
        _ = out.hiden
    assert not isinstance(got.value, OutputError)
    assert not hasattr(out, "shape") and getattr(out, "grad_fn", None) is None
    with pytest.raises(FrozenInstanceError):
        out.hidden = out.hidden


def test_the_record_is_copied_and_pickled() -> None:
    out = tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, block_output())
    for other in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert isinstance(other, MoEOutput) and torch.equal(other.hidden, out.hidden)


SNIPPET = """
from typing import Any
from spmd_moe import MoE

def used(moe: MoE, x: Any) -> None:
    reveal_type(moe(x))
    reveal_type(moe(x, mask=x, expert_ids=None))
    moe(x) + 1
    moe(x).sum()
    moe(x).hiden
    moe(x, masks=x)
"""


def test_plain_mypy_knows_what_a_call_returns(tmp_path: Path) -> None:
    """Without the plugin; and the errors of misuse are not hidden from it."""
    (tmp_path / "snippet.py").write_text(SNIPPET.lstrip())
    (tmp_path / "mypy.ini").write_text(  # torch is not read, which would take a minute
        f"[mypy]\nmypy_path={ROOT}\nfollow_imports=silent\n"
        "[mypy-torch.*,spmd_types.*]\nfollow_imports=skip\n"
    )
    words = ["--config-file", "mypy.ini", "--no-error-summary", "snippet.py"]
    command = [sys.executable, "-m", "mypy", *words]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = re.findall(r"snippet.py:(\d+): (?:note: (Revealed.*)|error: .*\[(.*)\])", ran.stdout)
    revealed = 'Revealed type is "spmd_moe.layer.moe_output.MoEOutput"'
    assert [line for line in found if line[0] != "9" or line[2]] == [
        ("5", revealed, ""),
        ("6", revealed, ""),
        ("7", "", "operator"),
        ("8", "", "attr-defined"),
        ("9", "", "attr-defined"),
        ("10", "", "call-arg"),
    ], ran.stdout + ran.stderr


def views(src: Kind, dst: Kind, shape: Sequence[int], training: bool) -> list[str]:
    """What is a view of another tensor, of all that a layer on two ranks returns."""
    mesh = MoEMesh.init("cpu", tp=2)
    layer = MoE(replace(CONFIG, src=src, dst=dst), mesh).train(training)
    init_weights(layer, mesh, seed=0)
    leaves, _ = tree_flatten_with_path(layer(torch.ones(*shape, CONFIG.dim)))
    return [keystr(path) for path, leaf in leaves if isinstance(leaf, Tensor) and leaf._is_view()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize("dst", [S(0), R, I], ids=str)
@pytest.mark.parametrize("src", [S(0), R, I], ids=str)
def test_nothing_in_it_is_a_view(
    src: Kind, dst: Kind, shape: Sequence[int], training: bool
) -> None:
    """FSDP warns of those: to add to one in place loses the hook that gathers for backward."""
    assert threaded(2, views, src, dst, shape, training) == [[], []]


# --- checkpoints ------------------------------------------------------------------------------


def flat(block: nn.Module) -> tuple[Callable[[Tensor], tuple[Any, ...]], list[Any]]:
    """A function that gives the leaves of the block's output, and a list that gets the tree."""
    trees: list[Any] = []

    def forward(x: Tensor) -> tuple[Any, ...]:
        leaves, tree = tree_flatten(block(x))
        trees.append(tree)
        return tuple(leaves)

    return forward, trees


def not_reentrant(block: nn.Module, x: Tensor) -> MoEOutput:
    out: MoEOutput = checkpoint(block, x, use_reentrant=False)
    return out


def reentrant(block: nn.Module, x: Tensor) -> MoEOutput:
    """This variant sees the gradient of tensors only that are returned as such, in one tuple."""
    forward, trees = flat(block)
    leaves = checkpoint(forward, x, use_reentrant=True)
    out: MoEOutput = tree_unflatten(leaves, trees[0])
    return out


@pytest.mark.parametrize("way", [not_reentrant, reentrant])
def test_the_record_passes_through_a_checkpoint(
    way: Callable[[nn.Module, Tensor], MoEOutput],
) -> None:
    mesh = MoEMesh.single()
    block = Block(mesh)
    out = way(block, tokens())
    assert isinstance(out.losses, LossTerms)
    loss_of(out, mesh).backward()
    assert_close(gradients(block), wanted())
    assert torch.equal(block.moe.router.seen_E, out.counts_E) and out.counts_E.sum() == 2 * TOKENS


def test_a_reentrant_checkpoint_does_not_look_into_any_record() -> None:
    """So it is torch that drops the gradient, here loudly: what comes back has no graph."""
    out = checkpoint(Block(MoEMesh.single()), tokens(), use_reentrant=True)
    assert isinstance(out, MoEOutput)
    assert not out.hidden.requires_grad


# --- FSDP -------------------------------------------------------------------------------------


def on_fsdp(ways: Sequence[str]) -> list[dict[str, Tensor]]:
    """The gradients of a sharded block on this rank's tokens, whole again."""
    mesh = MoEMesh.init("cpu", dp=dist.get_world_size())
    return [fsdp_gradients(way, mesh) for way in ways]


def fsdp_gradients(way: str, mesh: MoEMesh) -> dict[str, Tensor]:
    block = Block(mesh)
    dense = mesh.dense["dp"]
    if way == "nested":  # the MoE's weights come when they are needed, and go again
        fully_shard(block.moe.experts, mesh=dense, reshard_after_forward=True)
    fully_shard(block, mesh=dense, reshard_after_forward=True)
    x, used = tokens(dist.get_rank()), block
    out: MoEOutput = checkpoint(used, x, use_reentrant=False) if way == "checkpoint" else used(x)
    if way == "losses":  # the first backward hook to fire is one of the losses
        out = replace(out, hidden=out.hidden.detach())
    loss_of_rank(out, mesh).backward()
    seen_E = block.moe.router.seen_E
    assert torch.equal(seen_E, out.counts_E) == (way != "losses")
    found = {}
    for name, gradient in gradients(block).items():
        assert isinstance(gradient, DTensor), name
        found[name] = gradient.full_tensor()
    return found


def loss_of_rank(out: MoEOutput, mesh: MoEMesh) -> Tensor:
    """A share of the loss for each rank. FSDP takes the mean of the ranks' gradients: undone."""
    assert out.losses is not None
    total = reduce_loss_terms(out.losses, mesh)
    aux = balance_loss(out.losses, total, mesh) + z_loss(out.losses, total)
    if not out.hidden.requires_grad:
        return aux * mesh[DP].size
    return (out.hidden.square().sum() / (out.hidden.numel() * mesh[DP].size) + aux) * mesh[DP].size


def wanted_of_losses(ranks: int) -> dict[str, Tensor]:
    mesh = MoEMesh.single()
    block = Block(mesh)
    out = block(torch.cat([tokens(r) for r in range(ranks)]))
    assert out.losses is not None
    total = reduce_loss_terms(out.losses, mesh)
    (balance_loss(out.losses, total, mesh) + z_loss(out.losses, total)).backward()
    found = gradients(block)
    assert set(found) == {"norm.weight", "norm.bias", "moe.router.weight_ED"}
    return found


@pytest.mark.gloo
def test_the_record_passes_through_fsdp() -> None:
    ways = ("plain", "nested", "checkpoint", "losses")
    for by_way in run(2, on_fsdp, ways):
        for way, got in zip(ways, by_way, strict=True):
            assert_close(got, wanted_of_losses(2) if way == "losses" else wanted(2))


# --- torch.compile ----------------------------------------------------------------------------


@pytest.mark.filterwarnings(OF_DYNAMO)
@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_record_passes_through_the_compiler(fullgraph: bool) -> None:
    mesh = MoEMesh.single()
    block = Block(mesh)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=fullgraph)
    for step in (1, 2):  # the second runs what the first has compiled
        block.zero_grad()
        out = compiled(tokens())
        assert isinstance(out, MoEOutput) and isinstance(out.losses, LossTerms)
        loss_of(out, mesh).backward()
        assert_close(gradients(block), wanted())
        assert torch.equal(block.moe.router.seen_E, step * out.counts_E)
    assert out.counts_E.sum() == 2 * TOKENS
