"""Versions of spmd_types: what 0.2.3 lacks, so that the package runs beside those that pin it.

0.2.3 has no `rules` (typing rules of autograd functions) and no `register_no_typecheck`; 0.3.0 has
only the first. Only checks use them. Without them the layer, training and checkpoints work, and a
check raises.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import spmd_types

from spmd_moe.core.errors import ConfigError, explain

_F = TypeVar("_F", bound=Callable[..., Any])

HAS_RULES = hasattr(spmd_types, "rules") and hasattr(spmd_types, "register_no_typecheck")

if HAS_RULES:
    from spmd_types import register_no_typecheck as register_no_typecheck
    from spmd_types import rules as rules
else:

    class _NoRules:
        """Every rule raises when a checker asks for it."""

        def __getattr__(self, name: str) -> Callable[..., object]:
            def rule(*args: object, **kwargs: object) -> None:
                require_rules(f"rules.{name}")

            return rule

    rules = _NoRules()  # type: ignore[assignment]  # it stands for the module

    def register_no_typecheck(fn: _F) -> _F:
        """Nothing to register: no checker of this version follows the package."""
        return fn


def require_rules(where: str) -> None:
    """Raise if the installed spmd_types cannot check this package."""
    if not HAS_RULES:
        raise ConfigError(
            explain(
                where,
                f"spmd_types {version('spmd_types')} is installed, and checks need 0.3.1 or newer",
                why="it lacks typing rules for functions of this package",
                fixes=["pip install 'spmd_types>=0.3.1,<0.4'   # in an environment for checks"],
            )
        )
