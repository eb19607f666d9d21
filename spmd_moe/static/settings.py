"""Settings of the static check, in the file that holds the project's settings for mypy.

[tool.spmd_moe]                         in pyproject.toml
strict = ["my_package.moe", "my_package.dispatch.*"]

[spmd_moe]                              in mypy.ini or setup.cfg
strict = my_package.moe, my_package.dispatch.*

A list in another of these files would have no effect, which is an error.
"""

from __future__ import annotations

import tomllib
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import final

_FILES = ("mypy.ini", ".mypy.ini", "pyproject.toml", "setup.cfg")  # where mypy looks for settings


@final
@dataclass(frozen=True, slots=True)
class Config:
    strict: tuple[str, ...] = ()

    def is_strict(self, module: str) -> bool:
        return any(fnmatchcase(module, pattern) for pattern in self.strict)

    def digest(self) -> list[str]:
        return list(self.strict)


def read_config(path: str | None) -> Config:
    """What the file says; nothing is strict where it says nothing, or cannot be read."""
    try:
        return Config(tuple(_patterns(Path(path)))) if path else Config()
    except (OSError, tomllib.TOMLDecodeError, ConfigParserError, TypeError, AttributeError):
        return Config()  # mypy reads the same file, and says what is wrong with it


def ignored_list(path: str | None) -> str | None:
    """A file next to `path` with another list of strict modules, which is not read."""
    if path is None:
        return None
    config = read_config(path)
    others = (str(Path(path).with_name(name)) for name in _FILES if name != Path(path).name)
    return next((o for o in others if read_config(o) not in (Config(), config)), None)


def _patterns(path: Path) -> list[str]:
    if path.suffix == ".toml":
        settings = tomllib.loads(path.read_text()).get("tool", {}).get("spmd_moe", {})
        return [str(pattern) for pattern in settings.get("strict", [])]
    parser = ConfigParser()
    parser.read(path)
    listed = parser.get("spmd_moe", "strict", fallback="")
    return [pattern.strip() for pattern in listed.replace("\n", ",").split(",") if pattern.strip()]
