"""What one rank finds unusable (scores, expert ids, its input), and all ranks it meets report.

A rank that raised alone would leave its peers waiting for it. So the router only marks what it
sees; the mark travels with the sizes that a dispatcher exchanges first, and every rank that gets it
raises the same error, after that exchange and before the next. Where the layer also gathers tokens
on tp, from ranks that this exchange does not reach, the marks are added up along tp before.
"""

# Shape letters in this file:
#   T  tokens    K  experts per token    E  experts

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import product
from typing import final

import torch
from torch import nn

from spmd_moe.core.collectives import declare_sum
from spmd_moe.core.errors import RoutingError, explain, plural
from spmd_moe.core.host_values import LateRead, is_replaying, read_ints
from spmd_moe.core.mesh import Axis
from spmd_moe.core.per_rank_work import max_over_ranks
from spmd_moe.core.placement import P, S, Tokens
from spmd_moe.core.redistribute import redistribute
from spmd_moe.core.torch_modes import is_capturing

# A rank's mark: how many of its scores are not finite, and on top of it if any of its ids is wrong,
# or if it was given what the layer cannot take. Marks of thousands of ranks can be added up.
_WRONG_ID = 1 << 40
REFUSED = 1 << 51
_TOLD = 8  # ranks that a message names


# spmd: allow unknown - the class that holds it says what it is
def nan_parameter(*shape: int) -> nn.Parameter:
    """A parameter without a value yet: NaN, so that using it is an error."""
    return nn.Parameter(torch.full(shape, torch.nan))


def mark_faults(logits_TE: Tokens, expert_ids_TK: Tokens | None, num_experts: int) -> Tokens:
    """The mark of this rank, on the device: 0 without faults. `logits_TE` may be weights."""
    # Only NaN and infinity less themselves are not 0; times 0, a compiler takes them for 0 too.
    found = (logits_TE - logits_TE).count_nonzero()
    if expert_ids_TK is None:
        return found
    wrong_TK = (expert_ids_TK < -1) | (expert_ids_TK >= num_experts)
    return found + wrong_TK.any() * _WRONG_ID


def sum_marks(marked: Tokens, axis: Axis) -> Tokens:
    """The sum of the marks of all ranks of an axis, to each of them, so that they raise alike."""
    sums = declare_sum(marked.expand(axis.size), axis)
    return redistribute(sums, axis, src=P, dst=S(0)).select(0, 0)


@final
class AloneCheck:
    """The check of a rank that exchanges nothing.

    On a CPU it raises at once. On CUDA that would be the only wait of the layer, so the mark is
    copied without a wait, and a later call raises once the copy is complete. Compiled and captured
    graphs are not checked.
    """

    def __init__(self) -> None:
        self._late: deque[tuple[LateRead, int]] = deque()

    def __deepcopy__(self, memo: object) -> AloneCheck:
        return AloneCheck()  # the original raises for marks being copied

    def check(self, marked: Tokens, logits_TE: Tokens, num_experts: int) -> None:
        if torch.compiler.is_compiling():
            return
        if marked.is_cpu:
            # spmd: allow unknown - the host reads it
            (found,) = read_ints(max_over_ranks(marked).view(1))
            _raise_alone(found, num_experts, logits_TE.numel())
        elif marked.is_cuda and not is_capturing(marked) and not is_replaying():
            self._check_earlier(num_experts)
            self._late.append((LateRead(marked), logits_TE.numel()))

    def _check_earlier(self, num_experts: int) -> None:
        while self._late and self._late[0][0].ready():
            late, scores = self._late.popleft()
            _raise_alone(late.value(), num_experts, scores, earlier=True)


def _raise_alone(found: int, num_experts: int, scores: int, earlier: bool = False) -> None:
    if found:
        unset = found % _WRONG_ID == scores
        raise _error([found], [], num_experts, may_be_unset=unset, earlier=earlier)


def check_marks(marks: Sequence[int], axes: Sequence[Axis], num_experts: int) -> None:
    """Raise if any rank has a mark, its `Routing.fault`. They stand in the order of the ranks of
    `axes`, the last in turn."""
    if any(marks):
        raise _error(marks, axes, num_experts)


def _error(
    marks: Sequence[int],
    axes: Sequence[Axis],
    num_experts: int,
    may_be_unset: bool = True,
    earlier: bool = False,
) -> RoutingError:
    when = " in an earlier call" if earlier else ""
    refused = [m >= REFUSED for m in marks]
    if any(refused):
        return RoutingError(
            explain(
                "MoE.forward",
                f"the input was refused on {_who(refused, axes)}",
                why="this rank would wait for what others will not send",
                fixes=["see the error there   # it says what is wrong with x, mask or expert_ids"],
            )
        )
    scores = [m % _WRONG_ID > 0 for m in marks]
    if any(scores):
        fixes = ["assert x.isfinite().all()   # before the layer, to find where they begin"]
        if may_be_unset and all(scores):
            fixes.insert(0, "init_weights(layer, mesh, seed=0)   # if the weights were never set")
        return RoutingError(
            explain(
                "Router",
                f"scores are NaN or infinite on {_who(scores, axes)}{when}",
                why="such a token has no best expert, and its gradient would spoil all weights",
                fixes=fixes,
            )
        )
    ids = [m >= _WRONG_ID for m in marks]
    return RoutingError(
        explain(
            "Router",
            f"expert_ids name experts that do not exist on {_who(ids, axes)}{when}",
            why=f"ids of {num_experts} experts are 0 to {num_experts - 1}, and -1 is no expert",
            fixes=[
                f"expert_ids = expert_ids.where(expert_ids < {num_experts}, -1).clamp(min=-1)"
                "   # no expert instead"
            ],
        )
    )


def _who(at_fault: Sequence[bool], axes: Sequence[Axis]) -> str:
    """How many ranks, and where they stand on the axes: `1 of 4 ranks (ep 3)`."""
    text = f"{sum(at_fault)} of {plural(len(at_fault), 'rank')}"
    if all(at_fault):
        return text
    places = product(*([f"{axis.name} {rank}" for rank in range(axis.size)] for axis in axes))
    found = [" ".join(place) for at, place in zip(at_fault, places, strict=True) if at]
    more = f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    return f"{text} ({', '.join(found[:_TOLD])}{more})"
