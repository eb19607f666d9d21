"""Choices of the router that few models make: by hand, compiled, twice differentiated, recomputed.

Values and gradients on all layouts are in `test_moe.py`, whose cases have these choices too.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spmd_moe import (
    ExpertRecompute,
    I,
    MoE,
    MoEConfig,
    MoEMesh,
    RouterConfig,
    RoutingError,
    ScoreApplication,
    SpmdMoeError,
    init_weights,
    update_selection_bias,
)
from spmd_moe.check.thread_ranks import threaded
from spmd_moe.layer.router import Router, Routing

ROUTER = RouterConfig(6, 2, dtype=torch.float64)
MANY = replace(
    ROUTER,
    score_func="sigmoid",
    choose_by="logits",
    route_norm=True,
    norm_eps=0.1,
    logit_softcap=1.5,
    expert_scale=True,
)
LAYERS = {
    "many": MoEConfig(4, 6, replace(MANY, input_dim=5)),
    "weighed input": MoEConfig(
        4, 6, ROUTER, bias=True, score_application=ScoreApplication.ON_INPUT
    ),
    "identity experts": MoEConfig(4, 6, replace(ROUTER, num_zero_experts=3, top_k=3)),
    "given": MoEConfig(4, 6, replace(ROUTER, given=True)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def router(config: RouterConfig) -> Router:
    torch.manual_seed(0)
    made = Router(config, 4, MoEMesh.single()).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def layer(config: MoEConfig, dtype: torch.dtype = torch.float64, **settings: Any) -> MoE:
    mesh = MoEMesh.single()
    made = MoE(replace(config, **settings), mesh)
    init_weights(made, mesh, seed=0, std=0.7)
    return made.to(dtype)


def given(config: MoEConfig, count: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Tokens, and what else such a layer is given."""
    draw = torch.Generator().manual_seed(1)
    wide, k = config.router.input_dim, config.router.top_k
    found = {"x": torch.randn(count, config.dim, generator=draw, dtype=torch.float64).to(dtype)}
    if wide is not None:
        found["router_input"] = torch.randn(count, wide, generator=draw, dtype=torch.float64)
    if config.router.given:
        found["expert_weights"] = torch.rand(count, k, generator=draw, dtype=torch.float64)
    found = {name: tensor.to(dtype).requires_grad_() for name, tensor in found.items()}
    ids = torch.arange(count * k).view(count, k) % config.router.num_experts
    return found | ({"expert_ids": ids} if config.router.given else {})


def gradients(made: MoE, hidden: Tensor, inputs: dict[str, Any]) -> list[Tensor]:
    leaves = [t for t in inputs.values() if t.requires_grad]
    found = torch.autograd.grad(hidden.square().sum(), [*leaves, *made.parameters()])
    return [hidden.detach(), *found]


# --- one choice at a time -----------------------------------------------------------------------


def test_soft_cap_epsilon_scale_and_two_scores() -> None:
    this, x_TD = router(MANY), torch.randn(9, 4, dtype=torch.float64)
    assert this.scale_E is not None
    routing = this(x_TD)
    logits = 1.5 * torch.tanh(x_TD @ this.weight_ED.T / 1.5)
    torch.testing.assert_close(routing.logits_TE, logits)
    assert torch.equal(routing.expert_ids_TK, logits.topk(2, dim=1).indices)
    chosen = logits.sigmoid().gather(1, routing.expert_ids_TK)
    weights = chosen / (chosen.sum(1, keepdim=True) + 0.1) * this.scale_E[routing.expert_ids_TK]
    torch.testing.assert_close(routing.scores_TK, weights)


def test_the_choice_is_by_its_own_score() -> None:
    """A selection bias is added to the score that chooses: to logits, it weighs less."""
    by_score, by_logit = (
        router(replace(ROUTER, score_func="sigmoid", choose_by=name)) for name in (None, "logits")
    )
    x_TD = torch.randn(50, 4, dtype=torch.float64)
    assert torch.equal(by_score(x_TD).expert_ids_TK, by_logit(x_TD).expert_ids_TK)
    for made in (by_score, by_logit):
        made.bias_E[2] = 0.5
    free, biased = by_score(x_TD), by_logit(x_TD)
    assert 0 < biased.counts_E[2] < free.counts_E[2]
    ids = biased.expert_ids_TK
    torch.testing.assert_close(biased.scores_TK, biased.logits_TE.sigmoid().gather(1, ids))


def test_a_group_that_is_not_used_may_be_chosen_by_a_score_of_0() -> None:
    config = replace(
        ROUTER, choose_by="logits", num_expert_groups=2, num_limited_groups=1, excluded_score=0.0
    )
    this = router(config)
    with torch.no_grad():
        this.weight_ED.zero_()[:, 0] = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    routing: Routing = this(torch.eye(4, dtype=torch.float64)[:1])
    assert all(expert >= 3 for expert in routing.expert_ids_TK.flatten().tolist())
    strict = router(replace(config, excluded_score=-torch.inf))
    with torch.no_grad():
        strict.weight_ED.copy_(this.weight_ED)
    assert strict(torch.eye(4, dtype=torch.float64)[:1]).expert_ids_TK.tolist() == [[0, 1]]


def test_identity_experts_return_their_input_and_are_balanced() -> None:
    config = LAYERS["identity experts"]
    made = layer(config)
    x = given(config, 40)["x"]
    made.router.bias_E[6:] = 9.0  # all choices are of identity experts
    out = made(x)
    weights = (x @ made.router.weight_ED.T).softmax(1)[:, 6:].sum(1, keepdim=True)
    torch.testing.assert_close(out.hidden, x * weights)
    assert out.counts_E.tolist() == [0] * 6 + [40] * 3 and not out.dropped
    out.hidden.sum().backward()
    update_selection_bias([made.router], made.mesh, 0.25)
    assert made.router.bias_E.tolist() == [0.25] * 6 + [8.75] * 3
    replayed = made(x, None, torch.full((40, 3), 8))
    assert replayed.counts_E[8] == 120 and not replayed.dropped


def test_a_given_router_has_no_parameters_and_checks_what_it_is_given() -> None:
    config = LAYERS["given"]
    made, inputs = layer(config), given(config)
    assert not list(made.router.parameters())
    x, ids, weights = inputs["x"], inputs["expert_ids"], inputs["expert_weights"].detach()
    with pytest.raises(RoutingError, match="scores are NaN"):
        made(x, expert_ids=ids, expert_weights=weights * torch.nan)
    with pytest.raises(RoutingError, match="experts that do not exist"):
        made(x, expert_ids=ids + 6, expert_weights=weights)
    mask = torch.arange(5) != 2
    masked = made(x, mask, ids, expert_weights=weights.index_fill(0, torch.tensor(2), torch.nan))
    whole = made(x, None, ids, expert_weights=weights).hidden
    torch.testing.assert_close(masked.hidden, whole * mask.unsqueeze(1))


def test_factors_of_experts_begin_with_1() -> None:
    scale_E = layer(LAYERS["many"]).router.scale_E
    assert scale_E is not None and scale_E.tolist() == [1.0] * 6


# --- with what else the layer can do ------------------------------------------------------------


@each_layer
def test_recomputed(name: str) -> None:
    config = LAYERS[name]
    inputs = given(config)
    plain = layer(config)
    want = gradients(plain, plain(**inputs).hidden, inputs)
    again = layer(config, recompute=ExpertRecompute.FIRST_MATMULS)
    whole = checkpoint(lambda: plain(**inputs).hidden, use_reentrant=False)
    for found in (
        gradients(again, again(**inputs).hidden, inputs),
        gradients(plain, whole, inputs),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@each_layer
def test_second_derivatives(name: str) -> None:
    config = LAYERS[name]
    made, inputs = layer(config), given(config, 3)
    ids = inputs.pop("expert_ids", None)
    names = [*inputs, *(name for name, _ in made.named_parameters())]

    def call(*leaves: Tensor) -> Tensor:
        values = dict(zip(names, leaves, strict=True))
        own = {n: values.pop(n) for n, _ in made.named_parameters()}
        y: Tensor = torch.func.functional_call(
            made, own, (values.pop("x"), None, ids), dict(values)
        ).hidden
        return y

    leaves = [*inputs.values(), *made.parameters()]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@each_layer
def test_bfloat16(name: str) -> None:
    config = replace(LAYERS[name], router=replace(LAYERS[name].router, dtype=torch.float32))
    made, inputs = layer(config, torch.bfloat16), given(config, dtype=torch.bfloat16)
    narrow = gradients(made, made(**inputs).hidden, inputs)
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in inputs.items()}
    wide = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in wide.items()}
    made = made.to(torch.float64)
    for a, b in zip(narrow, gradients(made, made(**wide).hidden, wide), strict=True):
        assert a.dtype is torch.bfloat16
        assert (a - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.slow
@each_layer
def test_compiled(name: str) -> None:
    """In one graph, if every choice is of an expert; else the host reads how many are."""
    warnings.simplefilter("ignore")  # the compiler's own, of tensors that are not leaves
    config = LAYERS[name]
    made, inputs = layer(config), given(config)
    whole = name in ("many", "weighed input")
    graph = torch.compile(made, backend="aot_eager", fullgraph=whole)
    want = gradients(made, made(**inputs).hidden, inputs)
    for a, b in zip(gradients(made, graph(**inputs).hidden, inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def refused_on_one_rank(name: str) -> str:
    mesh = MoEMesh.init("cpu", dp=2, tp=2, ep=4)
    config = replace(LAYERS[name], src=I, dst=I, router=replace(LAYERS[name].router, num_experts=8))
    made = MoE(config, mesh)
    init_weights(made, mesh, seed=0)
    made = made.double()
    inputs = given(config)
    if mesh.dense.get_rank() == 3:
        inputs["x"] = inputs["x"][:, :3]
    try:
        made(**inputs)
    except SpmdMoeError as error:
        return str(error).partition("\n")[0]
    return ""


@pytest.mark.parametrize("name", ["many", "given"])
def test_what_one_rank_refuses_all_ranks_hear_of(name: str) -> None:
    *others, own = threaded(4, refused_on_one_rank, name)
    assert own.startswith("MoE.forward: x f64[5, 3] does not end in the layer's dim 4")
    assert all("the input was refused on 1 of 4 ranks" in text for text in others), others


def of_many_choices(degrees: dict[str, int]) -> Tensor:
    config = replace(LAYERS["identity experts"], dim=4)
    config = replace(config, router=replace(config.router, num_experts=2, top_k=4))
    mesh = MoEMesh.init("cpu", **degrees)
    made = MoE(config, mesh)
    init_weights(made, mesh, seed=0, std=0.7)
    hidden: Tensor = made.double()(given(config)["x"]).hidden
    return hidden.detach()


def test_more_choices_than_experts() -> None:
    """Of identity experts, as of these there are three."""
    (alone,) = threaded(1, of_many_choices, {})
    for found in threaded(2, of_many_choices, {"dp": 2, "ep": 2}):
        torch.testing.assert_close(found, alone)
