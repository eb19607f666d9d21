"""The router against its definition, written here as loops over numbers.

Choices are compared with a search over all choices, weights and gradients with plain autograd.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from spmd_moe import MoEMesh
from spmd_moe.layer.router import Router, Routing
from spmd_moe.layer.router_config import RouterConfig
from spmd_moe.layer.router_scores import SCORES, ScoreName

WIDTH, TOKENS = 3, 7
NAMES: list[ScoreName] = ["softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router_of(config: RouterConfig, bias: Tensor | None = None) -> Router:
    """A router in float64, with weights that spread the scores."""
    router = Router(config, WIDTH, MoEMesh.single()).to(torch.float64)
    with torch.no_grad():
        router.weight_ED.copy_(draw(1, config.num_experts, WIDTH))
        if bias is not None:
            router.bias_E.copy_(bias)
    return router


def in_float64(num_experts: int, top_k: int, **settings: Any) -> RouterConfig:
    return RouterConfig(num_experts, top_k, dtype=torch.float64, **settings)


# --- the definition: one token, one number at a time ------------------------------------------


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[d] * b[d] for d in range(len(a))), torch.zeros((), dtype=torch.float64))


def shares(numbers: list[Tensor]) -> list[Tensor]:
    """exp(n) of each, as a part of their sum."""
    powers = [n.exp() for n in numbers]
    return [p / torch.stack(powers).sum() for p in powers]


def scores_by_definition(logits: list[Tensor], name: str) -> list[Tensor]:
    """What experts are ranked by."""
    if name == "softmax":
        return shares(logits)
    if name == "sigmoid":
        return [1 / (1 + (-n).exp()) for n in logits]
    if name == "sqrt_softplus":
        return [n.exp().log1p().sqrt() for n in logits]
    return logits


def weights_by_definition(
    x_D: Tensor, weight_ED: Tensor, ids: list[int], config: RouterConfig
) -> list[Tensor]:
    """The weights of one token's choices; 0 for a choice of no expert."""
    logits = [dot(weight_ED[e], x_D) for e in range(config.num_experts)]
    scores = scores_by_definition(logits, config.score_func)
    real = [e for e in ids if e >= 0]
    chosen = [scores[e] for e in real]
    if config.score_func == "softmax_chosen" and real:
        chosen = shares(chosen)
    if config.route_norm and real:
        total = torch.stack(chosen).sum()
        chosen = [c / total for c in chosen]
    weights = iter(c * config.route_scale for c in chosen)
    return [next(weights) if e >= 0 else x_D.new_zeros(()) for e in ids]


def choice_by_definition(rank: list[float], config: RouterConfig) -> list[int]:
    """The groups, then the experts, of the greatest sum among all that could be; best first."""
    size = config.num_experts // config.num_expert_groups

    def worth(group: int) -> float:
        return sum(sorted(rank[group * size : (group + 1) * size])[-config.group_score_top_k :])

    kept = max(
        combinations(range(config.num_expert_groups), config.num_limited_groups),
        key=lambda groups: sum(worth(g) for g in groups),
    )
    allowed = [e for g in kept for e in range(g * size, (g + 1) * size)]
    best = max(combinations(allowed, config.top_k), key=lambda ids: sum(rank[e] for e in ids))
    return sorted(best, key=lambda e: -rank[e])


def choices_by_definition(
    routing: Routing, bias_E: Tensor, config: RouterConfig
) -> list[list[int]]:
    """What all tokens choose, given their logits."""
    scores = [scores_by_definition(list(n), config.score_func) for n in routing.logits_TE.detach()]
    ranks = [[float(s + b) for s, b in zip(row, bias_E, strict=True)] for row in scores]
    return [choice_by_definition(rank, config) for rank in ranks]


def check(router: Router, x_TD: Tensor, **given: Tensor | None) -> Routing:
    """Values, and gradients to inputs and weights, against the definition for the same choices."""
    x = x_TD.clone().requires_grad_()
    routing: Routing = router(x, **given)
    leaves = [x, router.weight_ED]
    want = torch.stack(
        [
            torch.stack(weights_by_definition(x[t], router.weight_ED, ids, router.config))
            for t, ids in enumerate(routing.expert_ids_TK.tolist())
        ]
    )
    upstream = draw(2, *want.shape)
    grads = torch.autograd.grad(routing.scores_TK, leaves, upstream)
    wanted = torch.autograd.grad(want, leaves, upstream)
    for got, expected in zip((routing.scores_TK, *grads), (want, *wanted), strict=True):
        assert expected.abs().max() > 1e-3  # zeros would agree too
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    return routing


# --- scores, and k ----------------------------------------------------------------------------


CASES = [
    (score, top_k, normalize)
    for score in NAMES
    for top_k in range(1, 6)
    for normalize in (False, True)
    if top_k > 1 or not (normalize or score == "softmax_chosen")  # refused: see below
]


@pytest.mark.parametrize(("score", "top_k", "normalize"), CASES)
def test_weights_and_gradients(score: ScoreName, top_k: int, normalize: bool) -> None:
    config = in_float64(5, top_k, score_func=score, route_norm=normalize, route_scale=2.5)
    router, x = router_of(config), draw(0, TOKENS, WIDTH)
    routing = check(router, x)
    wanted = choices_by_definition(routing, torch.zeros(5), config)
    assert routing.expert_ids_TK.tolist() == wanted
    assert len({tuple(ids) for ids in wanted}) > 1
    if normalize:
        total = routing.scores_TK.sum(1)
        torch.testing.assert_close(total, torch.full_like(total, 2.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", NAMES)
def test_probabilities_are_scores_as_shares_of_one(score: ScoreName) -> None:
    routing = router_of(in_float64(5, 2, score_func=score))(draw(0, TOKENS, WIDTH))
    for logits, probs in zip(routing.logits_TE, routing.probs_TE, strict=True):
        scores = scores_by_definition(list(logits), score)
        scores = shares(scores) if score == "softmax_chosen" else scores
        want = torch.stack(scores) / torch.stack(scores).sum()
        torch.testing.assert_close(probs, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("given", [False, True], ids=["chosen", "given"])
@pytest.mark.parametrize("score", NAMES)
def test_tiny_scores_have_finite_weights_and_slopes(score: ScoreName, given: bool) -> None:
    """In float32 as in float64, for logits down to -200, of which a sigmoid is 0; a loss times 100.

    As long as scores are numbers of their dtype, the router chooses the best; then any.
    """
    config = RouterConfig(4, 2, score, route_norm=True)
    ids = torch.tensor([[0, 1]]) if given else None
    for logit in (-1.0, -39.0, -41.0, -80.0, -86.0, -87.5, -95.0, -103.0, -150.0, -200.0):
        router = Router(config, WIDTH, MoEMesh.single())
        slopes_E = torch.tensor([logit, logit - 0.5, logit - 1, 0.0 if given else logit - 1.5])
        with torch.no_grad():
            router.weight_ED.zero_()[:, 0] = slopes_E
        x = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
        routing = router(x, expert_ids_TK=ids)
        v_K, v_E = torch.tensor([3.0, -1.0]), torch.tensor([2.0, -1.0, 0.5, 1.0])
        loss = (routing.scores_TK * v_K).sum() + (routing.probs_TE * v_E).sum()
        (loss * 100).backward()

        wide, w = (t.detach().double().requires_grad_() for t in (x, router.weight_ED))
        scores = torch.stack(scores_by_definition(list((wide @ w.T)[0]), score))
        scores = scores.softmax(0) if score == "softmax_chosen" else scores
        chosen = scores[routing.expert_ids_TK[0]]
        weights = chosen / chosen.sum()
        wanted = (weights * v_K).sum() + (scores / scores.sum() * v_E).sum()
        (wanted * 100).backward()
        torch.testing.assert_close(routing.scores_TK[0].double(), weights, rtol=1e-4, atol=1e-4)
        for found, want in ((x, wide), (router.weight_ED, w)):
            assert found.grad is not None and want.grad is not None and want.grad.any()
            torch.testing.assert_close(found.grad.double(), want.grad, rtol=1e-4, atol=1e-4)


def test_every_score_is_tested() -> None:
    assert list(SCORES) == NAMES


@pytest.mark.parametrize("score", NAMES)
def test_extreme_logits_have_finite_weights_and_slopes(score: ScoreName) -> None:
    router = router_of(in_float64(4, 2, score_func=score))
    x = (torch.tensor([[-1e4], [1e4], [0.0]], dtype=torch.float64) * draw(0, 3, WIDTH)).detach()
    routing = router(x.requires_grad_())
    routing.scores_TK.sum().backward()
    assert routing.scores_TK.max() > 0.1
    assert x.grad is not None and x.grad.isfinite().all()
    assert routing.scores_TK.isfinite().all() and routing.probs_TE.isfinite().all()


@pytest.mark.parametrize("gate", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("score", NAMES)
def test_the_gate_has_its_own_precision(
    score: ScoreName, model: torch.dtype, gate: torch.dtype
) -> None:
    """The products too: logits that were rounded to bf16 on the way would be off by a percent."""
    router = router_of(RouterConfig(5, 2, score_func=score, dtype=gate)).to(model)
    x = draw(0, TOKENS, WIDTH).to(model).requires_grad_()
    routing = router(x)
    exact = router_of(in_float64(5, 2, score_func=score))
    with torch.no_grad():
        exact.weight_ED.copy_(router.weight_ED)
    want = exact(x.detach().to(torch.float64), expert_ids_TK=routing.expert_ids_TK)
    rtol, atol = (1e-5, 1e-6) if gate is torch.float32 else (1e-12, 0.0)
    for name in ("logits_TE", "probs_TE", "scores_TK"):
        got = getattr(routing, name)
        assert got.dtype is gate, name
        torch.testing.assert_close(got.to(torch.float64), getattr(want, name), rtol=rtol, atol=atol)
    routing.scores_TK.backward(draw(2, TOKENS, 2).to(gate))
    grads = [x.grad, router.weight_ED.grad]
    assert all(g is not None and g.dtype is model and g.abs().max() > 1e-3 for g in grads)


# --- choice -----------------------------------------------------------------------------------

STEERING = torch.tensor([0.9, -0.4, 0.0, 0.6, -0.8, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("score", NAMES)
def test_bias_steers_the_choice_and_not_the_weight(score: ScoreName) -> None:
    config, x = in_float64(6, 2, score_func=score), draw(0, TOKENS, WIDTH)
    plain, steered = router_of(config), router_of(config, STEERING)
    free, biased = plain(x), steered(x)
    wanted = choices_by_definition(biased, STEERING, config)
    assert biased.expert_ids_TK.tolist() == wanted
    assert not torch.equal(free.expert_ids_TK, biased.expert_ids_TK)
    same = plain(x, expert_ids_TK=biased.expert_ids_TK)
    assert torch.equal(same.scores_TK, biased.scores_TK) and biased.scores_TK.abs().max() > 0.1
    assert torch.equal(free.probs_TE, biased.probs_TE)


def test_no_gradient_reaches_the_bias() -> None:
    router = router_of(in_float64(6, 2, score_func="sigmoid"), STEERING)
    router.bias_E.requires_grad_()
    router(draw(0, TOKENS, WIDTH)).scores_TK.sum().backward()
    assert router.bias_E.grad is None
    assert router.weight_ED.grad is not None and router.weight_ED.grad.abs().max() > 1e-3
    assert [name for name, _ in router.named_parameters()] == ["weight_ED"]


GROUPED = [(8, 1, 4, 1), (8, 2, 4, 1), (8, 4, 4, 2), (8, 3, 4, 3), (8, 2, 4, 4), (6, 3, 2, 1)]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("group_best", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_experts", "top_k", "groups", "kept"), GROUPED)
def test_choice_within_the_best_groups(
    num_experts: int, top_k: int, groups: int, kept: int, score: str, group_best: int, biased: bool
) -> None:
    limits = {
        "num_expert_groups": groups,
        "num_limited_groups": kept,
        "group_score_top_k": group_best,
    }
    config = in_float64(num_experts, top_k, score_func=score, **limits)
    bias = draw(3, num_experts) * 0.3 * biased
    x = draw(0, 40, WIDTH)
    routing = check(router_of(config, bias), x)
    assert routing.expert_ids_TK.tolist() == choices_by_definition(routing, bias, config)
    unlimited = router_of(replace(config, num_expert_groups=1, num_limited_groups=1), bias)(x)
    # By their best alone, the groups of the k best experts are the first to be kept.
    felt = kept < groups and (group_best == 2 or top_k > kept)
    assert torch.equal(unlimited.expert_ids_TK, routing.expert_ids_TK) is not felt


def test_groups_of_one_expert() -> None:
    """There is no second best to add."""
    config = in_float64(4, 2, num_expert_groups=4, num_limited_groups=2, group_score_top_k=2)
    x = draw(0, TOKENS, WIDTH)
    assert torch.equal(
        router_of(config)(x).expert_ids_TK, router_of(in_float64(4, 2))(x).expert_ids_TK
    )


@pytest.mark.parametrize("score", NAMES)
def test_forced_balance(score: ScoreName) -> None:
    """Experts in turn; weights and gradients as if the scores had chosen them."""
    routing = check(
        router_of(in_float64(7, 3, score_func=score, force_balance=True)), draw(0, 7, WIDTH)
    )
    assert routing.expert_ids_TK.flatten().tolist() == [slot % 7 for slot in range(21)]
    assert routing.counts_E.tolist() == [3] * 7
    assert routing.complete


# --- given choices, and masks -----------------------------------------------------------------

NONE = -1
REPLAYED = torch.tensor([[4, 0], [NONE, 2], [1, NONE], [NONE, NONE], [3, 3], [2, 1], [0, 4]])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", NAMES)
def test_choices_from_outside(score: ScoreName, normalize: bool) -> None:
    """Weights come from the live scores; a choice of no expert weighs nothing."""
    config = in_float64(5, 2, score_func=score, route_norm=normalize, route_scale=1.5)
    routing = check(router_of(config), draw(0, TOKENS, WIDTH), expert_ids_TK=REPLAYED)
    assert torch.equal(routing.expert_ids_TK, REPLAYED)
    assert routing.scores_TK[REPLAYED < 0].tolist() == [0.0] * 4
    assert routing.scores_TK[REPLAYED >= 0].abs().min() > 0
    assert routing.counts_E.tolist() == [REPLAYED.eq(e).sum().item() for e in range(5)]
    assert not routing.complete


def test_replay_of_the_routers_own_choice_changes_nothing() -> None:
    router, x = (
        router_of(in_float64(5, 2, score_func="sigmoid", route_norm=True)),
        draw(0, TOKENS, WIDTH),
    )
    first = router(x)
    again = router(x, expert_ids_TK=first.expert_ids_TK)
    assert torch.equal(first.scores_TK, again.scores_TK) and first.scores_TK.abs().max() > 0.1
    assert torch.equal(first.counts_E, again.counts_E)
    assert first.complete and not again.complete


@pytest.mark.parametrize("given", [None, REPLAYED], ids=["chosen", "given"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", NAMES)
def test_masked_tokens(
    score: ScoreName, normalize: bool, balanced: bool, given: Tensor | None
) -> None:
    config = in_float64(5, 2, score_func=score, route_norm=normalize, force_balance=balanced)
    router, x = router_of(config), draw(0, TOKENS, WIDTH).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, False, True])
    routing = check(router, x.detach(), mask_T=mask, expert_ids_TK=given)
    alone = router(x.detach()[mask], expert_ids_TK=None if given is None else given[mask])
    assert routing.expert_ids_TK[~mask].tolist() == [[NONE, NONE]] * 3
    assert routing.scores_TK[~mask].tolist() == [[0.0, 0.0]] * 3
    ids = routing.expert_ids_TK[mask]
    assert torch.equal(ids, alone.expert_ids_TK)
    torch.testing.assert_close(routing.scores_TK[mask], alone.scores_TK, rtol=1e-14, atol=0)
    assert routing.counts_E.tolist() == [ids.eq(e).sum().item() for e in range(5)]
    assert not routing.complete
    router(x, mask, given).scores_TK.backward(draw(2, TOKENS, 2))
    assert x.grad is not None and x.grad[~mask].abs().max() == 0 and x.grad[mask].abs().max() > 1e-3


@pytest.mark.parametrize("score", NAMES)
def test_all_tokens_masked(score: ScoreName) -> None:
    router, x = (
        router_of(in_float64(5, 2, score_func=score, route_norm=True)),
        draw(0, TOKENS, WIDTH),
    )
    routing = router(x.requires_grad_(), torch.zeros(TOKENS, dtype=torch.bool))
    routing.scores_TK.sum().backward()
    assert routing.counts_E.tolist() == [0] * 5 and (routing.expert_ids_TK == NONE).all()
    assert x.grad is not None and router.weight_ED.grad is not None
    for zero in (routing.scores_TK, x.grad, router.weight_ED.grad):
        assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("score", NAMES)
def test_no_tokens(score: ScoreName, groups: int, balanced: bool) -> None:
    router = router_of(
        in_float64(4, 2, score_func=score, num_expert_groups=groups, force_balance=balanced)
    )
    routing = router(torch.zeros(0, WIDTH, dtype=torch.float64))
    assert routing.expert_ids_TK.shape == routing.scores_TK.shape == (0, 2)
    assert routing.logits_TE.shape == routing.probs_TE.shape == (0, 4)
    assert routing.counts_E.tolist() == [0] * 4
    routing.scores_TK.sum().backward()
    grad = router.weight_ED.grad
    assert grad is not None and torch.equal(grad, torch.zeros_like(grad))


def test_ids_and_counts_are_int64() -> None:
    routing = router_of(in_float64(5, 2))(draw(0, TOKENS, WIDTH))
    assert routing.expert_ids_TK.dtype is routing.counts_E.dtype is torch.int64
    assert routing.counts_E.shape == (5,) and routing.counts_E.sum() == TOKENS * 2
    ids = routing.expert_ids_TK
    assert routing.counts_E.tolist() == [ids.eq(e).sum().item() for e in range(5)]
