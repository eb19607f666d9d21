"""Settings of the static check, in the file that holds the project's settings for mypy.

[tool.spmd_moe]                         in pyproject.toml
strict = ["my_package.moe", "my_package.dispatch.*"]

[spmd_moe]                              in mypy.ini or setup.cfg
strict = my_package.moe, my_package.dispatch.*

A list in another of these files would have no effect, which is an error; so is a setting that
there is not.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

_FILES = ("mypy.ini", ".mypy.ini", "pyproject.toml", "setup.cfg")  # where mypy looks for settings


@final
@dataclass(frozen=True, slots=True)
class Config:
    strict: tuple[str, ...] = ()

    def is_strict(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.strict)

    def with_strict(self, modules: Iterable[str]) -> Config:
        return replace(self, strict=(*self.strict, *modules))

    def digest(self) -> list[str]:
        return list(self.strict)


def read_config(path: str | None) -> Config:
    """What the file says; nothing is strict where it says nothing, or cannot be read."""
    try:
        return Config(tuple(_patterns(Path(path)))) if path else Config()
    except (OSError, tomllib.TOMLDecodeError, ConfigParserError, TypeError, AttributeError):
        return Config()  # mypy reads the same file, and says what is wrong with it


def settings_file(path: str | None) -> str | None:
    """The file that is read: mypy's own; where mypy reads none, one here that has a list."""
    here = (str(Path.cwd() / name) for name in _FILES)
    return path or next((file for file in here if read_config(file) != Config()), None)


def ignored_list(path: str | None) -> str | None:
    """A file next to `path` with another list of strict modules, which is not read.

    Where mypy has found the user's own settings, the files of the project are those here.
    """
    if path is None:
        return None
    config, own = read_config(path), Path(path).resolve()
    of_user = own.parent in (Path.home(), Path.home() / ".config" / "mypy")
    folders = [own.parent, *([Path.cwd()] if of_user else [])]
    others = [folder / name for folder in folders for name in _FILES if folder / name != own]
    return next((str(o) for o in others if read_config(str(o)) not in (Config(), config)), None)


def wrong_setting(path: str | None) -> str | None:
    """What is no setting of ours in our section, or no list of modules; None if all is well."""
    try:
        section = _section(Path(path)) if path else {}
    except (OSError, tomllib.TOMLDecodeError, ConfigParserError, AttributeError):
        return None  # mypy says what is wrong with it
    for name, value in section.items():
        if name != "strict":
            return f"{name!r} is no setting; there is 'strict'"
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            return f"strict = {value!r} is not a list of modules"
    return None


def _section(path: Path) -> dict[str, object]:
    if path.suffix == ".toml":
        found: dict[str, object] = (
            tomllib.loads(path.read_text()).get("tool", {}).get("spmd_moe", {})
        )
        return dict(found)
    parser = ConfigParser(default_section="")
    parser.read(path)
    return dict(parser["spmd_moe"]) if parser.has_section("spmd_moe") else {}


def _patterns(path: Path) -> list[str]:
    listed: Any = _section(path).get("strict", [])
    if isinstance(listed, str) and path.suffix != ".toml":
        listed = listed.replace("\n", ",").split(",")
    return [pattern.strip() for pattern in map(str, listed) if pattern.strip()]
