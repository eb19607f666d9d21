"""The plugin as mypy sees it. Most names are none of ours, which is found once for each."""

from __future__ import annotations

import hashlib
from functools import cache, cached_property
from os import sep
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mypy.nodes import MypyFile
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
        OfClass,
        OfFunction,
        OfMethod,
        OfSignature,
    )

H = TypeVar("H")


class SpmdMoePlugin(Plugin):
    """Placements in mypy. It holds no state of its own beyond what a run writes down."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # So that mypy reads the definition of `Placed` that is meant for this plugin.
        options.always_true = [*options.always_true, "_WITH_PLUGIN"]
        self._config = read_config(options.config_file)
        self._is_daemon = options.fine_grained_incremental
        self._for_daemon = options.fine_grained_incremental or options.cache_fine_grained
        # The answer for each name: mypy asks for the same ones a hundred times.
        self._annotations: dict[str, OfAnnotation | None] = {}
        self._functions: dict[str, OfFunction | None] = {}
        self._methods: dict[str, OfMethod | None] = {}
        self._signatures: dict[str, OfSignature | None] = {}
        self._attributes: dict[str, OfAttribute | None] = {}

    @cached_property
    def _answers(self) -> Answers:
        from spmd_moe.static.answers import Answers  # a warm run needs none of it
        from spmd_moe.static.daemon import Daemon

        daemon = Daemon(self.options) if self._is_daemon else None
        return Answers(self.lookup_fully_qualified, self._config, daemon)

    def _keep(self, known: dict[str, H | None], fullname: str, hook: H | None) -> H | None:
        if self._answers.lasts(fullname):
            known[fullname] = hook
        return hook

    def get_type_analyze_hook(self, fullname: str) -> OfAnnotation | None:
        if fullname in self._annotations:
            return self._annotations[fullname]
        hook, always = self._answers.annotation(fullname)
        if always:
            self._annotations[fullname] = hook
        return hook

    def get_function_hook(self, fullname: str) -> OfFunction | None:
        if fullname in self._functions:
            return self._functions[fullname]
        return self._keep(self._functions, fullname, self._answers.function(fullname))

    def get_method_hook(self, fullname: str) -> OfMethod | None:
        if fullname in self._methods:
            return self._methods[fullname]
        return self._keep(self._methods, fullname, self._answers.method(fullname))

    def get_method_signature_hook(self, fullname: str) -> OfSignature | None:
        if not fullname.endswith(".__call__"):
            return None
        if fullname in self._signatures:
            return self._signatures[fullname]
        return self._keep(self._signatures, fullname, self._answers.signature(fullname))

    def get_attribute_hook(self, fullname: str) -> OfAttribute | None:
        if fullname in self._attributes:
            return self._attributes[fullname]
        return self._keep(self._attributes, fullname, self._answers.attribute(fullname))

    def get_additional_deps(self, file: MypyFile) -> list[tuple[int, str, int]]:
        """None; but mypy asks for each file that it reads, which a daemon does again and again."""
        if not self._is_daemon or is_foreign(file.fullname + "."):
            return []
        if not file.is_typeshed_file(self.options):
            self._answers.begin_module(file)
        return []

    def get_customize_class_mro_hook(self, fullname: str) -> OfClass | None:
        if not self._for_daemon or is_foreign(fullname):
            return None
        from spmd_moe.static.daemon import tell_dependencies

        return tell_dependencies

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
