"""The plugin as mypy sees it. Most names are none of ours, which is found once for each."""

from __future__ import annotations

import hashlib
from functools import cache, cached_property
from os import sep
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mypy.options import Options
from mypy.plugin import Plugin, ReportConfigContext

from spmd_moe.static import codes as codes  # settings may name them, so mypy has to know them
from spmd_moe.static.config import read_config
from spmd_moe.static.names import is_foreign

if TYPE_CHECKING:
    from spmd_moe.static.answers import (
        Answers,
        OfAnnotation,
        OfAttribute,
        OfFunction,
        OfMethod,
        OfSignature,
    )


class SpmdMoePlugin(Plugin):
    """Placements in mypy. It holds no state of its own beyond what a run writes down."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # So that mypy reads the definition of `Placed` that is meant for this plugin.
        options.always_true = [*options.always_true, "_WITH_PLUGIN"]
        self._config = read_config(options.config_file)
        # The answer for each name: mypy asks for the same ones a hundred times.
        self._annotations: dict[str, OfAnnotation | None] = {}
        self._functions: dict[str, OfFunction | None] = {}
        self._methods: dict[str, OfMethod | None] = {}
        self._signatures: dict[str, OfSignature | None] = {}
        self._attributes: dict[str, OfAttribute | None] = {}

    @cached_property
    def _answers(self) -> Answers:
        from spmd_moe.static.answers import Answers  # a warm run needs none of it

        return Answers(self.lookup_fully_qualified, self._config)

    def get_type_analyze_hook(self, fullname: str) -> OfAnnotation | None:
        if fullname in self._annotations:
            return self._annotations[fullname]
        hook, always = self._answers.annotation(fullname)
        if always:
            self._annotations[fullname] = hook
        return hook

    def get_function_hook(self, fullname: str) -> OfFunction | None:
        if fullname not in self._functions:
            self._functions[fullname] = self._answers.function(fullname)
        return self._functions[fullname]

    def get_method_hook(self, fullname: str) -> OfMethod | None:
        if fullname not in self._methods:
            self._methods[fullname] = self._answers.method(fullname)
        return self._methods[fullname]

    def get_method_signature_hook(self, fullname: str) -> OfSignature | None:
        if not fullname.endswith(".__call__"):
            return None
        if fullname not in self._signatures:
            self._signatures[fullname] = self._answers.signature(fullname)
        return self._signatures[fullname]

    def get_attribute_hook(self, fullname: str) -> OfAttribute | None:
        if fullname not in self._attributes:
            self._attributes[fullname] = self._answers.attribute(fullname)
        return self._attributes[fullname]

    def report_config_data(self, ctx: ReportConfigContext) -> Any:
        """What a cached result depends on: a digest of the rules, for modules they can touch."""
        if is_foreign(ctx.id + ".") or f"{sep}typeshed{sep}" in ctx.path:
            return None
        return [rules_digest(), self._config.is_strict(ctx.id)]


@cache
def rules_digest() -> str:
    """A hash of every file of the static check."""
    files = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
