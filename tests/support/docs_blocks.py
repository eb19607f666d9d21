"""README and docs pages: their programs and what these print, and the parts written by a program.

python -m tests.support.docs_blocks --write   # rewrites all of them; then read the diff

A page has three kinds of blocks that this file fills in or compares:

- a fenced `python` block is run; the `text` block directly after it is what it prints, or the
  error of this package that ends it. A fenced `py` block is not run; a comment says why;
- `<!-- mypy: name.py -->` holds what mypy with the plugin reports about the block whose first line
  is `# name.py`. A module is strict if its name begins with `strict_`;
- `<!-- moves: ... -->` and the like hold tables made from the code.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from spmd_moe import SpmdMoeError
from spmd_moe.check import rules
from spmd_moe.core.redistribute import moves_table
from spmd_moe.static.error_codes import codes_table
from tests.support.mypy_lock import mypy_alone
from tests.support.simulated_ranks import leave_world

ROOT = Path(__file__).resolve().parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
# mypy's cache for the runs with a user's settings; several tests share it.
GUEST_CACHE = ROOT / ".mypy_cache" / "guest"


def pages() -> list[Path]:
    return [README, *sorted(DOCS.rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A program, and what it prints or the error that ends it, if the page shows that."""

    number: int
    code: str
    shown: str | None

    @property
    def file(self) -> str:
        """The name in its first line, `# name.py`."""
        named = re.match(r"# (\w+\.py)\n", self.code)
        return named[1] if named else "program.py"


def blocks(text: str) -> Iterator[Block]:
    for number, match in enumerate(BLOCK.finditer(text), 1):
        yield Block(number, match[1], match[2])


def outcome(block: Block) -> str:
    """What the program prints, and the message of this package that ends it, if one does."""
    printed = io.StringIO()
    program = compile(block.code, "program.py", "exec", dont_inherit=True)
    lines = block.code.splitlines(keepends=True)
    linecache.cache["program.py"] = (len(block.code), None, lines, "program.py")
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {"__name__": "program"})
    except SpmdMoeError as error:
        return f"{printed.getvalue()}{error}\n"
    finally:
        leave_world()
        linecache.cache.pop("program.py", None)
    return printed.getvalue()


# --- tables made from the code ------------------------------------------------------------------


def rules_table() -> str:
    """As the command line lists them, each rule that has a page with a link to it."""
    pages_of_rules = {page.stem for page in (DOCS / "rules").glob("*.md")}

    def linked(m: re.Match[str]) -> str:
        return f"| [{m[1]}](rules/{m[1]}.md) |" if m[1] in pages_of_rules else m[0]

    return re.sub(r"^\| (\w+) \|", linked, rules.rules_table(), flags=re.M)


def linked_codes_table() -> str:
    """As `codes_table`, each code with a link to its page."""
    return re.sub(r"^\| `(placement-\w+)`", r"| [`\1`](codes/\1.md)", codes_table(), flags=re.M)


GENERATED = {"moves": moves_table, "rules": rules_table, "codes": linked_codes_table}


def generated(text: str) -> str:
    """A page with its generated tables made again."""
    for name, make in GENERATED.items():
        if f"<!-- {name}:" in text:
            text = filled(text, name, make())
    return text


def filled(text: str, name: str, new: str) -> str:
    """A page with other text between the marks of that name."""
    pattern = rf"(<!-- {re.escape(name)}:[^\n]*-->\n).*?(<!-- end of {re.escape(name)} -->)"
    text, found = re.subn(pattern, lambda m: f"{m[1]}{new}\n{m[2]}", text, flags=re.S)
    assert found == 1, f"no place for {name}"
    return text


# --- what mypy reports --------------------------------------------------------------------------

MYPY = re.compile(r"<!-- mypy: (\w+\.py) -->\n.*?<!-- end of mypy -->", re.S)


def typed_files() -> dict[str, str]:
    """The blocks that mypy reads, by the name of the module."""
    found: dict[str, str] = {}
    for page in pages():
        text = page.read_text()
        sources = {block.file: block.code for block in blocks(text)}
        for name in MYPY.findall(text):
            assert name.removesuffix(".py") not in found, f"{page}: {name} stands on another page"
            found[name.removesuffix(".py")] = sources[name]
    return found


def program(path: Path) -> ModuleType:
    """A program that is in no package, as a module."""
    spec = spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def reported() -> tuple[ModuleType, dict[str, str], str]:
    """The porting example, its files, and what mypy reports on these and on the typed blocks."""
    example = program(ROOT / "examples" / "03_porting.py")
    settings = vars(example)
    settings["CONFIG"] += "[spmd_moe]\nstrict = strict_*\n"
    sources: dict[str, str] = example.versions()
    with tempfile.TemporaryDirectory() as folder, mypy_alone():
        files = {**sources, **typed_files()}
        return example, sources, example.checked(Path(folder), files, GUEST_CACHE)


def porting() -> str:
    example, sources, said = reported()
    lines = example.walk(sources, said)
    first = next(n for n, line in enumerate(lines) if line.startswith("typed.py"))
    return "\n".join(["```text", *lines[first:], "```"])


def report_of(name: str) -> str:
    lines = re.findall(rf"(?:^|[/\\])({re.escape(name)}:.*)", reported()[2], re.M)
    return "\n".join(["```text", *(lines or ["Success: no issues found"]), "```"])


def with_reports(text: str) -> str:
    """A page with what mypy reports made again."""
    if "<!-- porting:" in text:
        text = filled(text, "porting", porting())
    return MYPY.sub(
        lambda m: f"<!-- mypy: {m[1]} -->\n{report_of(m[1])}\n<!-- end of mypy -->", text
    )


def rewritten(text: str) -> str:
    """A page with its tables and the outputs of its programs made again."""
    for block in blocks(text):
        if block.shown is not None:
            old = f"```python\n{block.code}```\n\n```text\n{block.shown}```"
            text = text.replace(old, f"```python\n{block.code}```\n\n```text\n{outcome(block)}```")
    return generated(text)


def main(words: list[str]) -> None:
    chosen = [Path(word).resolve() for word in words if not word.startswith("-")] or pages()
    for page in chosen:
        new = rewritten(page.read_text())
        if "--no-mypy" not in words:
            new = with_reports(new)
        if "--write" in words:
            page.write_text(new)


if __name__ == "__main__":
    main(sys.argv[1:])
