"""The settings of the layer, and checks for contradictions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, final

from spmd_moe.core.errors import ConfigError, explain
from spmd_moe.core.placement import I, Kind, R
from spmd_moe.core.validate import check_instance, check_one_of, check_positive_ints
from spmd_moe.layer.activations import SWIGLU, Activation
from spmd_moe.layer.boundary import INSIDE
from spmd_moe.layer.router_config import RouterConfig


class ScoreApplication(Enum):
    """Where a row is multiplied by the router's weight.

    `BEFORE_SECOND_MATMUL`: the output of the experts need not be saved for backward.
    `IN_COMBINE`: required by some checkpoints; the output is saved.
    `ON_INPUT`: the input of the expert is multiplied, as in Llama 4; the product is saved.

    Example:
        >>> from spmd_moe import MoEConfig, RouterConfig, ScoreApplication
        >>> choice = ScoreApplication.IN_COMBINE
        >>> config = MoEConfig(8, 16, RouterConfig(4, top_k=2), score_application=choice)
    """

    BEFORE_SECOND_MATMUL = "before the second matmul"
    """The row's output is never needed again, so it is not kept for backward."""
    IN_COMBINE = "in combine"
    """As some checkpoints demand; keeps the output for the weights' gradient."""
    ON_INPUT = "on input"
    """Multiplies the input of the expert, as in Llama 4; the product is saved for backward."""


class ExpertRecompute(Enum):
    """Activations of the experts that backward computes again instead of saving them.

    `NONE`: the results of the first matmuls are saved.
    `FIRST_MATMULS`: backward computes the first matmuls again.

    Example:
        >>> from spmd_moe import ExpertRecompute, MoEConfig, RouterConfig
        >>> choice = ExpertRecompute.FIRST_MATMULS
        >>> config = MoEConfig(8, 16, RouterConfig(4, top_k=2), recompute=choice)
    """

    NONE = "none"
    """The results of the first matmuls are saved."""
    FIRST_MATMULS = "first matmuls"
    """Backward computes the first matmuls again."""


@final
@dataclass(frozen=True, slots=True)
class SharedConfig:
    """A shared expert, through which all tokens pass.

    Args:
        hidden_dim: The width of its hidden layer.
        gated: Whether a sigmoid gate scales its output.
        sharded: Whether its weights are sharded on tp; otherwise they are replicated.
        activation: Its activation. Default: that of the routed experts.

    Raises:
        ConfigError: A value has another type, or is not positive.

    Example:
        >>> from spmd_moe import MoEConfig, RouterConfig, SharedConfig
        >>> config = MoEConfig(8, 16, RouterConfig(4, top_k=2), shared=SharedConfig(16, gated=True))
    """

    hidden_dim: int
    gated: bool = False
    sharded: bool = False
    activation: Activation | None = None

    def __post_init__(self) -> None:
        check_positive_ints("SharedConfig", hidden_dim=self.hidden_dim)
        for name in ("gated", "sharded"):
            check_instance("SharedConfig", name, getattr(self, name), bool, f"{name}=True")
        if self.activation is not None:
            check_instance(
                "SharedConfig", "activation", self.activation, Activation, "activation=SWIGLU"
            )


@final
@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Settings of the layer: its computation, and the placement of the caller's tokens.

    Args:
        dim: Width of a token.
        hidden_dim: Width of the hidden layer of one expert.
        router: How tokens choose experts.
        activation: The function between the matrices of an expert.
        bias: Whether experts have biases.
        score_application: Where rows are multiplied by the router's weights.
        recompute: Which activations of the experts backward computes again.
        shared: A shared expert.
        src: Placement of the input tokens on tp: `S(0)` (each rank has its own rows), `R` or `I`.
        dst: Placement of the output tokens on tp.
        balance: What the losses balance over; None computes no loss terms. With `"sequence"` and
            `S(0)` on tp, batch row `b` must be a chunk of the same sequence on every tp rank.

    Raises:
        ConfigError: A value has another type, or is out of range.

    Example:
        >>> from spmd_moe import I, MoEConfig, RouterConfig
        >>> config = MoEConfig(64, 128, RouterConfig(8, top_k=2), src=I, dst=I, balance="batch")
    """

    dim: int
    hidden_dim: int
    router: RouterConfig
    activation: Activation = SWIGLU
    bias: bool = False
    score_application: ScoreApplication = ScoreApplication.BEFORE_SECOND_MATMUL
    recompute: ExpertRecompute = ExpertRecompute.NONE
    shared: SharedConfig | None = None
    src: Kind = INSIDE
    dst: Kind = INSIDE
    balance: Literal["batch", "sequence"] | None = None

    def __post_init__(self) -> None:
        """Refuse what is wrong on any mesh; parts of the layer check what depends on the mesh."""
        where = "MoEConfig"
        check_positive_ints(where, dim=self.dim, hidden_dim=self.hidden_dim)
        check_instance(
            where, "router", self.router, RouterConfig, "router=RouterConfig(8, top_k=2)"
        )
        check_instance(where, "bias", self.bias, bool, "bias=True")
        check_instance(where, "activation", self.activation, Activation, "activation=SWIGLU")
        check_instance(
            where,
            "score_application",
            self.score_application,
            ScoreApplication,
            "score_application=ScoreApplication.BEFORE_SECOND_MATMUL",
        )
        check_instance(
            where, "recompute", self.recompute, ExpertRecompute, "recompute=ExpertRecompute.NONE"
        )
        if self.shared is not None:
            fix = f"shared=SharedConfig({self.hidden_dim})"
            check_instance(where, "shared", self.shared, SharedConfig, fix)
        check_one_of(where, "balance", self.balance, ("batch", "sequence", None))
        if self.balance is not None and (self.router.given or self.router.num_zero_experts):
            router = "given=True" if self.router.given else "num_zero_experts"
            raise ConfigError(
                explain(
                    where,
                    f"balance is {self.balance!r}, with a router of {router}",
                    why="the loss is computed from the layer's own logits, one of each expert",
                    fixes=["balance=None"],
                )
            )
        _check_boundary_kinds(where, src=self.src, dst=self.dst)


def _check_boundary_kinds(where: str, **kinds: object) -> None:
    """Kinds that tokens can have on tp outside of the layer."""
    known = (R, I, INSIDE)
    for name, kind in kinds.items():
        if not any(kind is k or (isinstance(kind, type(k)) and kind == k) for k in known):
            meant = next((k for k in known if repr(k) == kind), INSIDE)
            raise ConfigError(
                explain(
                    where,
                    f"{name} is {kind!r}; it must be R, I or S(0)",
                    why="on tp, tokens are whole on every rank or sharded by rows",
                    fixes=[f"{name}={meant!r}"],
                )
            )
