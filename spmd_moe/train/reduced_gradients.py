"""Which gradients are sums over the ranks already: known until backward adds to them.

    reduce_gradients    a sum
    backward            a sum and more: neither a norm nor another sum can be taken of it
    zero_grad           nothing of the sum is left, also where its memory is kept and set to zero

What zeroes memory leaves no trace, so two hooks on the parameter look at it when backward comes.
"""

from __future__ import annotations

from typing import final

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary


@final
class _Sum:
    """The last sum that a parameter's gradient was, and what became of it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = TensorWeakRef(parameter)
        self._grad: TensorWeakRef | None = None
        self._before: Tensor | None = None  # nonzero numbers in the gradient, as backward came
        self.rest: Tensor | None = None  # as many, of the sum, when backward added to it
        parameter.register_hook(self._comes)
        parameter.register_post_accumulate_grad_hook(self._came)

    def take(self, grad: Tensor) -> None:
        self._grad, self.rest = TensorWeakRef(grad), None

    def is_in(self, parameter: Tensor | None) -> bool:
        """Is the gradient the tensor that was the sum?"""
        if self._grad is None or parameter is None or parameter.grad is None:
            return False
        return parameter.grad is self._grad()

    def _comes(self, _: Tensor) -> None:
        parameter = self._parameter()
        self._before = None
        if self.is_in(parameter):
            self._before = parameter.grad.count_nonzero()

    def _came(self, parameter: Tensor) -> None:
        if self._before is not None:  # of a backward that adds, not of `torch.autograd.grad`
            some = self._before if self.rest is None else self.rest * (self._before != 0)
            assert parameter.grad is not None
            self.take(parameter.grad)  # another one, where backward itself can be differentiated
            self.rest, self._before = some, None


_SUMS = WeakIdKeyDictionary()  # by parameter


def note_sum(parameter: nn.Parameter) -> None:
    """The gradient is a sum from now on."""
    if parameter not in _SUMS:
        _SUMS[parameter] = _Sum(parameter)
    _SUMS[parameter].take(parameter.grad)


def is_sum(parameter: nn.Parameter) -> bool:
    """The gradient is a sum, to which nothing was added."""
    last = _SUMS.get(parameter)
    return last is not None and last.is_in(parameter) and last.rest is None


def rest_of_sum(parameter: nn.Parameter) -> Tensor | None:
    """How many nonzero numbers of an earlier sum the gradient has in it; None where none can be."""
    last = _SUMS.get(parameter)
    if last is None or not last.is_in(parameter):
        return None
    rest: Tensor | None = last.rest
    return parameter.grad.count_nonzero() if rest is None and parameter.grad is not None else rest
