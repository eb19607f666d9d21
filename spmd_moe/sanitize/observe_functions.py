"""Annotated functions of a model, and an observer that sees their declared tensors.

Functions are intercepted from outside, so the model needs no line for it, and between watched steps
runs its own bytecode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import BoundArguments
from typing import Any, final

from torch import Tensor, nn

from spmd_moe.core.errors import users_line
from spmd_moe.core.placement import Placement
from spmd_moe.signatures.annotated_functions import (
    AnnotatedFunction,
    annotated_functions,
    packages_of,
)
from spmd_moe.signatures.interception import intercepted

# It gets the function, the path of a tensor, the tensor, its declared placement, the user's line.
Observer = Callable[[str, str, Tensor, Placement, str], None]


@final
class Boundaries:
    """The annotated functions with a placement that `matters`, in the packages of a model."""

    def __init__(self, model: nn.Module, matters: Callable[[Placement], bool]) -> None:
        found = annotated_functions(packages_of(model))
        self._functions = [each for each in found if any(map(matters, each.placements()))]

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Show `observer` each declared tensor on its way into and out of the functions."""

        def run(each: AnnotatedFunction, bound: BoundArguments) -> Any:
            line = users_line(sys._getframe(3))
            for seen in each.arguments(bound):
                observer(each.name, *seen, line)
            result = each.original(*bound.args, **bound.kwargs)
            for seen in each.result(result):
                observer(each.name, *seen, line)
            return result

        with intercepted(self._functions, run):
            yield
