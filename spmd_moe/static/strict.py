"""Strict mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mypy.nodes import Context

from spmd_moe.static.messages import Problem


def strict_problems(checker: Any) -> Iterator[tuple[Problem, Context]]:
    yield from ()
