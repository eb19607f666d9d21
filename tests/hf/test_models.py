"""Whole tiny models beside transformers: logits, loss, gradients, tokens, losses of balance."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spmd_moe.hf as hf
from spmd_moe import DP, ConfigError, MoEMesh, reduce_gradients
from spmd_moe.check.thread_ranks import threaded
from tests.hf.models import (
    LAYOUTS,
    LENGTH,
    MODELS,
    SEQUENCES,
    TARGETS,
    gradient_error,
    long_if,
    mine,
    model_of,
    theirs,
    tokens,
)


def on_a_rank(
    whole: nn.Module,
    degrees: dict[str, int],
    logits: Tensor,
    grads: dict[str, Tensor],
    recomputed: bool = False,
) -> tuple[float, float, float]:
    """Errors of logits and gradients, and this rank's part of the loss."""
    mesh = MoEMesh.init("cpu", **degrees)
    model: Any = hf.swap(copy.deepcopy(whole), mesh)
    if recomputed:
        model.activation_checkpointing_enable()
        model.config.use_cache = False
    out = model(mine(mesh), labels=mine(mesh), num_items_in_batch=TARGETS)
    out.loss.backward()
    reduce_gradients(model, mesh)
    each = len(logits) // mesh[DP].size
    own = logits[mesh[DP].rank * each :][:each]
    return (
        float((out.logits.detach() - own).abs().max()),
        gradient_error(model, mesh, grads),
        float(out.loss.detach()) / (mesh.dense.size() // mesh[DP].size),
    )


@pytest.mark.parametrize("name", MODELS)
def test_one_process(name: str) -> None:
    mesh = MoEMesh.single()
    model = hf.swap(model_of(name), mesh)
    out = model(tokens(), labels=tokens(), num_items_in_batch=TARGETS)
    out.loss.backward()
    logits, loss, grads = theirs(name)
    torch.testing.assert_close(out.logits, logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.loss, loss, atol=2e-6, rtol=0)
    assert gradient_error(model, mesh, grads) < 1e-5


# The blocks of Mixtral and OLMoE have no option that the other models have not.
RANKS = [
    pytest.param(name, degrees, marks=long_if(i != j and name in ("mixtral", "olmoe")))
    for i, name in enumerate(MODELS)
    for j, degrees in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(("name", "degrees"), RANKS, ids=str)
def test_ranks(name: str, degrees: dict[str, int]) -> None:
    logits, loss, grads = theirs(name)
    found = threaded(4, on_a_rank, model_of(name), degrees, logits, grads)
    assert max(error for error, _, _ in found) < 2e-5
    assert max(error for _, error, _ in found) < 1e-5
    assert sum(part for _, _, part in found) == pytest.approx(float(loss), abs=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_generated_tokens_are_the_same(name: str) -> None:
    model = model_of(name).eval()
    ours = hf.swap(copy.deepcopy(model), MoEMesh.single())
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    assert torch.equal(ours.generate(tokens(), **how), model.generate(tokens(), **how))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe"])
def test_router_logits_and_the_pooled_loss(name: str) -> None:
    model = model_of(name)
    ours = hf.swap(copy.deepcopy(model), MoEMesh.single())
    out, expected = (m(tokens(), labels=tokens(), output_router_logits=True) for m in (ours, model))
    assert len(out.router_logits) == len(expected.router_logits) == 2
    for logits, logits_theirs in zip(out.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(logits, logits_theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-6, rtol=0)


def padding() -> Tensor:
    """Two sequences that end early."""
    mask = torch.ones(SEQUENCES, LENGTH, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[3, 2:] = 0
    return mask


def pooled_on_a_rank(
    whole: nn.Module, degrees: dict[str, int], masked: bool, grads: dict[str, Tensor]
) -> tuple[float, float, float, int]:
    """This rank's parts of the auxiliary loss and of the loss, an error, and rows of logits."""
    mesh = MoEMesh.init("cpu", **degrees)
    model: Any = hf.swap(copy.deepcopy(whole), mesh)
    each = SEQUENCES // mesh[DP].size
    mask = padding()[mesh[DP].rank * each :][:each] if masked else None
    how = {"labels": mine(mesh), "num_items_in_batch": TARGETS, "output_router_logits": True}
    out = model(mine(mesh), mask, **how)
    out.loss.backward()
    reduce_gradients(model, mesh)
    copies = mesh.dense.size() // mesh[DP].size
    parts = float(out.aux_loss.detach()) / copies, float(out.loss.detach()) / copies
    return *parts, gradient_error(model, mesh, grads), len(out.router_logits[1])


@pytest.mark.parametrize(
    ("degrees", "masked"),
    [*((degrees, True) for degrees in LAYOUTS), (LAYOUTS[1], False)],
    ids=str,
)
def test_the_pooled_loss_over_ranks(degrees: dict[str, int], masked: bool) -> None:
    whole = model_of("qwen3_moe", router_aux_loss_coef=0.5)
    alone = copy.deepcopy(whole)
    how = {"labels": tokens(), "num_items_in_batch": TARGETS, "output_router_logits": True}
    out = alone(tokens(), padding() if masked else None, **how)
    out.loss.backward()
    grads = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    found = threaded(4, pooled_on_a_rank, whole, degrees, masked, grads)
    aux, loss = float(out.aux_loss.detach()), float(out.loss.detach())
    assert sum(part for part, *_ in found) == pytest.approx(aux, abs=1e-6)
    assert sum(part for _, part, *_ in found) == pytest.approx(loss, abs=2e-6)
    assert max(error for *_, error, _ in found) < 1e-5
    rows = SEQUENCES * LENGTH // degrees.get("dp", 1)  # also where ranks of tp share them out
    assert [rows_found for *_, rows_found in found] == [rows] * 4


def tuple_on_a_rank(whole: nn.Module) -> str:
    model: Any = hf.swap(copy.deepcopy(whole), MoEMesh.init("cpu", dp=2, ep=2))
    assert isinstance(model(tokens(), return_dict=False), tuple)
    with pytest.raises(ConfigError) as error:
        model(tokens(), return_dict=False, output_router_logits=True)
    return str(error.value).partition("\n")[0]


def test_the_pooled_loss_in_a_tuple_is_refused() -> None:
    said = "Qwen3MoeForCausalLM.forward: output_router_logits is True, and return_dict is False."
    assert threaded(2, tuple_on_a_rank, model_of("qwen3_moe")) == [said] * 2


@pytest.mark.parametrize("degrees", [{}, LAYOUTS[1]], ids=str)
def test_gradient_checkpointing(degrees: dict[str, int]) -> None:
    logits, _, grads = theirs("qwen3_moe")
    world = 4 if degrees else 1
    found = threaded(world, on_a_rank, model_of("qwen3_moe"), degrees, logits, grads, True)
    assert max(error for error, _, _ in found) < 2e-5
    assert max(error for _, error, _ in found) < 1e-5


def test_a_copy_is_a_model_of_its_own() -> None:
    ours = hf.swap(model_of("qwen3_moe"), MoEMesh.single())
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    out = twin(tokens(), labels=tokens(), output_router_logits=True)
    assert torch.count_nonzero(out.router_logits[0]) == out.router_logits[0].numel()
    expected = model_of("qwen3_moe")(tokens()).logits
    torch.testing.assert_close(out.logits, expected, atol=2e-5, rtol=0)


def test_bfloat16() -> None:
    """Beside float32 of the same rounded weights: transformers' own gate is rounded too."""
    ours = hf.swap(model_of("qwen3_moe"), MoEMesh.single()).to(torch.bfloat16)
    logits = ours(tokens()).logits
    assert logits.dtype is torch.bfloat16
    exact = ours.float()(tokens()).logits
    assert float(((logits.float() - exact).abs().max() / exact.abs().max()).detach()) < 0.05


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "gpt_oss"])
def test_routers_in_the_dtype_of_the_model(name: str) -> None:
    """The logits of the first layer are then transformers' to the bit; the default is nearer."""
    model = model_of(name).to(torch.bfloat16)
    mesh = MoEMesh.single()
    ours = hf.swap(copy.deepcopy(model), mesh, router_in_model_dtype=True)
    more_exact = hf.swap(copy.deepcopy(model), mesh)
    logits = [
        each(tokens(), output_router_logits=True).router_logits[0]
        for each in (model, ours, more_exact)
    ]
    assert torch.equal(logits[1], logits[0].float()) and not torch.equal(logits[2], logits[1])
