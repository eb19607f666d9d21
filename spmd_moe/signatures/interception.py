"""Interception of annotated functions, without a line in them.

While a function is intercepted its code is that of `_trampoline`, so that every reference leads
there, from every importing module. Afterwards it has its own code again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from spmd_moe.signatures.annotated_functions import INTERCEPTED, AnnotatedFunction, Handler

TRAMPOLINE = __file__  # frames of this file have the globals of the program
_KEY = "the function's key"
_NUMBERS = itertools.count()


@contextmanager
def intercepted(functions: Iterable[AnnotatedFunction], handler: Handler) -> Iterator[None]:
    """Run `handler` in place of each function, in all threads."""
    with ExitStack() as stack:
        for each in functions:
            stack.callback(_intercept(each, handler))
        yield


def _intercept(each: AnnotatedFunction, handler: Handler) -> Callable[[], None]:
    """Give a function the trampoline's code; returns what gives it back its own."""
    function, code, own = each.function, each.function.__code__, vars(each.function)
    key = f"{next(_NUMBERS)} {each.name}"
    INTERCEPTED[key] = each, handler
    consts = tuple(key if const == _KEY else const for const in _trampoline.__code__.co_consts)
    # A function keeps its cells, so the code must have as many free variables.
    function.__code__ = _trampoline.__code__.replace(co_consts=consts, co_freevars=code.co_freevars)
    has_signature = "__signature__" in own
    own.setdefault("__signature__", each.signature)  # the program may ask for it

    def restore() -> None:
        function.__code__ = code
        if not has_signature:
            del own["__signature__"]
        del INTERCEPTED[key]

    return restore


def _trampoline(*args: Any, **kwargs: Any) -> Any:
    # Runs with the globals of another function, so what it needs is imported here.
    from spmd_moe.signatures.annotated_functions import call_intercepted

    return call_intercepted("the function's key", args, kwargs)
