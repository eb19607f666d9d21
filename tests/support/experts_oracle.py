"""The experts as a student would write them, in float64, and the cases they are compared on.

One expert after another, by autograd: nothing here knows of kept tensors, blocks or operators.
"""

# Shape letters in this file:
#   R  rows, sorted by expert     e  experts     D  model width     F  hidden width
#   A, B  any width

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from spmd_moe.core.mesh import MoEMesh
from spmd_moe.layer.activations import Activation
from spmd_moe.layer.experts import Experts, experts_ffn
from spmd_moe.layer.grouped_ffn import Weights
from spmd_moe.layer.grouped_matmul import GroupedMatmul
from spmd_moe.layer.moe_config import ExpertRecompute

NUM_EXPERTS, WIDTH, HIDDEN = 4, 16, 24


def activate(name: str, gate: Tensor, up: Tensor | None) -> Tensor:
    if name == "squared_relu":
        return torch.where(gate > 0, gate * gate, 0)
    if name == "gelu":
        return gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    assert up is not None
    if name == "swiglu":
        return gate / (1 + torch.exp(-gate)) * up
    assert name == "clamped_swiglu(limit=7.0, alpha=1.702)"
    # Where a value lies on a limit, bf16 may round it across, and finds another slope.
    assert not any((abs(abs(t) - 7.0) < 0.05).any() for t in (gate, up)), "draw another case"
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def loop(given: dict[str, Tensor], counts: tuple[int, ...], name: str) -> Tensor:
    """`y_RD`, with zeros in the rows past the last expert's."""
    w, x_RD, scores_R = weights_in(given), given["x"], given.get("scores")
    parts, start = [], 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        gate = x_RD[rows] @ w.w1_eFD[e].T
        up = None if w.w3_eFD is None else x_RD[rows] @ w.w3_eFD[e].T
        if w.b1_eF is not None:
            gate = gate + w.b1_eF[e]
        if w.b3_eF is not None and up is not None:
            up = up + w.b3_eF[e]
        y = activate(name, gate, up) @ w.w2_eDF[e].T
        if "b2_eD" in given:
            y = y + given["b2_eD"][e]
        parts.append(y if scores_R is None else y * scores_R[rows].unsqueeze(1))
        start += count
    return torch.cat([*parts, torch.zeros_like(x_RD[start:])])


def weights_in(given: dict[str, Tensor]) -> Weights:
    """What the kernels take: all but the bias of the last matmul."""
    return Weights(**{name: t for name, t in given.items() if name in Weights._fields})


@dataclass(frozen=True)
class Case:
    """What the experts are given. Rows `past` the last expert's are poison: NaN and infinity."""

    activation: Activation
    counts: tuple[int, ...]
    bias: bool = False
    scored: bool = True
    past: int = 0
    dtype: torch.dtype = torch.float64
    widths: tuple[int, int] = (WIDTH, HIDDEN)

    def drawn(self, what: str, *shape: int) -> Tensor:
        """Values that depend on the name alone; the same in all dtypes except for rounding."""
        seed = int.from_bytes(what.encode(), "little") % 2**31
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(self.dtype)

    def weights(self) -> dict[str, Tensor]:
        e, (D, F), gated = len(self.counts), self.widths, self.activation.gated
        shapes: dict[str, tuple[int, ...]] = {"w1_eFD": (e, F, D), "w2_eDF": (e, D, F)}
        if gated:
            shapes["w3_eFD"] = (e, F, D)
        if self.bias:
            shapes |= {"b1_eF": (e, F), "b2_eD": (e, D)}
            if gated:
                shapes["b3_eF"] = (e, F)
        # Large enough that clamps clamp, and that no gradient is small by accident.
        return {name: self.drawn(name, *s) * 0.75 for name, s in shapes.items()}

    def leaves(self) -> dict[str, Tensor]:
        """Everything that gets a gradient, by its name."""
        total = sum(self.counts)
        x = self.drawn("x", total + self.past, self.widths[0])
        scores = self.drawn("scores", total + self.past).abs() + 0.5
        scores = scores.to(torch.promote_types(self.dtype, torch.float32))
        x[total:], scores[total:] = math.nan, math.nan
        found = {"x": x} | ({"scores": scores} if self.scored else {})
        return {name: t.requires_grad_() for name, t in (found | self.weights()).items()}

    def upstream(self) -> Tensor:
        total = sum(self.counts)
        dy = self.drawn("dy", total + self.past, self.widths[0])
        dy[total:] = math.inf
        return dy

    @cache  # noqa: B019  # the same for every kernel; the cases are few and small
    def expected(self) -> dict[str, Tensor]:
        """The output and every gradient, by the loop in float64, on the same rounded values."""
        total = sum(self.counts)
        given = {n: t.detach().double().nan_to_num() for n, t in self.leaves().items()}
        wide = {n: t.requires_grad_() for n, t in given.items()}
        y = loop(wide, self.counts, self.activation.name)
        dy = torch.cat([self.upstream()[:total].double(), torch.zeros_like(y[total:])])
        found = torch.autograd.grad(
            y, list(wide.values()), dy, allow_unused=True, materialize_grads=True
        )
        return {"y": y.detach()} | dict(zip(wide, found, strict=True))

    def by_function(
        self, matmul: GroupedMatmul, keep: ExpertRecompute = ExpertRecompute.NONE
    ) -> dict[str, Tensor]:
        """The same from the kernels."""
        given = self.leaves()
        return self._gradients(self.kernel(given, matmul, keep), given)

    def kernel(
        self, given: dict[str, Tensor], matmul: GroupedMatmul, keep: ExpertRecompute
    ) -> Tensor:
        y_RD = experts_ffn(
            given["x"],
            torch.tensor(self.counts),
            weights_in(given),
            given.get("scores"),
            None,
            self.activation,
            matmul,
            keep,
            padded=self.past > 0,
        )
        if "b2_eD" not in given:
            return y_RD
        # What the module does with the last bias.
        counts, none = torch.tensor([*self.counts, self.past]), torch.zeros(1, y_RD.shape[1])
        b_RD = torch.cat([given["b2_eD"], none.to(y_RD)]).repeat_interleave(counts, 0)
        total = sum(self.counts)
        if "scores" in given:
            scores_R = torch.cat([given["scores"][:total], torch.zeros(self.past)])
            b_RD = (b_RD * scores_R.unsqueeze(1)).to(y_RD.dtype)
        return y_RD + b_RD

    def by_layer(
        self, matmul: GroupedMatmul | None, keep: ExpertRecompute = ExpertRecompute.NONE
    ) -> dict[str, Tensor]:
        """The same from the module, which adds the last bias on its own."""
        given, layer = self.leaves(), self.layer(matmul, keep)
        y = layer(given["x"], torch.tensor(self.counts), given.get("scores"))
        return self._gradients(y, given | dict(layer.named_parameters()))

    def layer(
        self, matmul: GroupedMatmul | None, keep: ExpertRecompute = ExpertRecompute.NONE
    ) -> Experts:
        D, F = self.widths
        layer = Experts(
            len(self.counts),
            D,
            F,
            MoEMesh.single(),
            activation=self.activation,
            bias=self.bias,
            recompute=keep,
            matmul=matmul,
        ).to(self.dtype)
        layer.load_state_dict(self.weights())
        return layer

    def _gradients(self, y: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert y.dtype is self.dtype
        y.backward(self.upstream())
        gradients = {name: leaf.grad for name, leaf in given.items()}
        found = {name: grad for name, grad in gradients.items() if grad is not None}
        assert found.keys() == gradients.keys(), f"no gradient: {gradients.keys() - found.keys()}"
        return {"y": y.detach()} | found


def compare(case: Case, got: dict[str, Tensor], tolerance: float) -> None:
    """Against the loop: off by at most `tolerance` of the largest value; zeros are exact."""
    wanted, total = case.expected(), sum(case.counts)
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert bool(want.any()) is (total > 0), f"{name}: nothing was compared"
        near = want.abs().max().item() * tolerance if want.numel() else 0.0
        off = (got[name].double() - want).abs()
        torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=near, msg=name)
        if name in case.weights():
            empty = [e for e, count in enumerate(case.counts) if not count]
            assert not got[name][empty].any(), f"{name}: an expert without rows"
        else:
            assert not got[name][total:].any(), f"{name}: a row past the end"


class OneHot:
    """A grouped matmul from outside the package: any dtype, any width, and one graph."""

    def rows(self, x_RA: Tensor, w_eAB: Tensor, ends_e: Tensor) -> Tensor:
        one_Re, x_RA = _one_hot(x_RA, ends_e)
        y_eRB = x_RA @ w_eAB
        return (y_eRB * one_Re.T.unsqueeze(2)).sum(0)

    def outer(self, dy_RB: Tensor, x_RA: Tensor, ends_e: Tensor) -> Tensor:
        one_Re, dy_RB = _one_hot(dy_RB, ends_e)
        dw_eBA: Tensor = (dy_RB * one_Re.T.unsqueeze(2)).mT @ _one_hot(x_RA, ends_e)[1]
        return dw_eBA

    def __repr__(self) -> str:
        return "OneHot()"


def _one_hot(x_RA: Tensor, ends_e: Tensor) -> tuple[Tensor, Tensor]:
    """Which expert each row is of, and the rows, with zeros for poison past the last end."""
    row_R1 = torch.arange(x_RA.shape[0]).unsqueeze(1)
    begins_e = torch.cat([ends_e.new_zeros(1), ends_e[:-1]])
    one_Re = ((row_R1 >= begins_e) & (row_R1 < ends_e)).to(x_RA.dtype)
    return one_Re, torch.where(row_R1 < ends_e[-1], x_RA, 0)
