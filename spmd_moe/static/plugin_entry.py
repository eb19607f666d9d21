"""Entry of the mypy plugin. Most names are not ours; each name is looked up once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, cached_property
from os import sep
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mypy.errors import CompileError
from mypy.nodes import MypyFile
from mypy.options import Options
from mypy.plugin import Plugin, ReportConfigContext

from spmd_moe.static import (
    error_codes as error_codes,  # settings may name them, so mypy has to know them
)
from spmd_moe.static.settings import ignored_list, read_config, settings_file, wrong_setting
from spmd_moe.static.torch_names import is_foreign

if TYPE_CHECKING:
    from spmd_moe.static.hook_table import (
        Answers,
        OfAnnotation,
        OfAttribute,
        OfClass,
        OfFunction,
        OfMethod,
        OfSignature,
    )

H = TypeVar("H")


ALWAYS_STRICT: list[str] = []  # modules, beside the settings: `spmd-moe types --strict`


class _Known(dict[str, H | None]):
    """The hook of each name, kept where it never changes: mypy asks for it a hundred times."""

    def __init__(self, ask: Callable[[str], tuple[H | None, bool]]) -> None:
        super().__init__()
        self._ask = ask

    def __missing__(self, fullname: str) -> H | None:
        hook, lasts = self._ask(fullname)
        if lasts:
            self[fullname] = hook
        return hook


class SpmdMoePlugin(Plugin):
    """Placements in mypy. It holds no state of its own beyond what a run writes down."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # So that mypy reads the definition of `Placed` that is meant for this plugin.
        options.always_true = [*options.always_true, "_WITH_PLUGIN"]
        settings = settings_file(options.config_file)
        self._config = read_config(settings).with_strict(ALWAYS_STRICT)
        if wrong := wrong_setting(settings):
            raise CompileError([f"{settings}: error: spmd_moe: {wrong}"], use_stdout=True)
        if other := ignored_list(settings):
            raise CompileError(_ignored(other, str(settings)), use_stdout=True)
        self._is_daemon = options.fine_grained_incremental
        self._for_daemon = options.fine_grained_incremental or options.cache_fine_grained
        self._annotations = _Known(lambda name: self._answers.annotation(name))
        self._functions = _Known(lambda name: self._lasting(name, self._answers.function(name)))
        self._methods = _Known(lambda name: self._lasting(name, self._answers.method(name)))
        self._signatures = _Known(lambda name: self._lasting(name, self._answers.signature(name)))
        self._attributes = _Known(lambda name: self._lasting(name, self._answers.attribute(name)))

    @cached_property
    def _answers(self) -> Answers:
        from spmd_moe.static.daemon import Daemon
        from spmd_moe.static.hook_table import Answers  # a warm run needs none of it

        daemon = Daemon(self.options) if self._is_daemon else None
        return Answers(self.lookup_fully_qualified, self._config, daemon)

    def _lasting(self, fullname: str, hook: H | None) -> tuple[H | None, bool]:
        return hook, self._answers.lasts(fullname)

    def get_type_analyze_hook(self, fullname: str) -> OfAnnotation | None:
        return self._annotations[fullname]

    def get_function_hook(self, fullname: str) -> OfFunction | None:
        return self._functions[fullname]

    def get_method_hook(self, fullname: str) -> OfMethod | None:
        return self._methods[fullname]

    def get_method_signature_hook(self, fullname: str) -> OfSignature | None:
        return self._signatures[fullname] if fullname.endswith(".__call__") else None

    def get_attribute_hook(self, fullname: str) -> OfAttribute | None:
        return self._attributes[fullname]

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


def _ignored(other: str, read: str) -> list[str]:
    section = "[tool.spmd_moe]" if Path(read).suffix == ".toml" else "[spmd_moe]"
    return [
        f"{other}: error: its list of strict modules has no effect",
        f"{other}: note:   why: mypy reads its settings from {read}",
        f"{other}: note:   fix: move the list to {section} in {Path(read).name}",
    ]


@cache
def rules_digest() -> str:
    """A hash of every file of the static check, and of what it reads of other folders."""
    here = Path(__file__).parent
    files = sorted(p for p in here.iterdir() if p.suffix in (".py", ".json"))
    files += [here.parent / "core" / "messages.py", here.parent / "check" / "rules.py"]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()
