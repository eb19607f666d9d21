"""What the README says that the code knows better: outputs of its programs, tables, files.

python -m tests.support.readme_blocks --write   # after a change; then read the diff
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from spmd_moe import SpmdMoeError
from spmd_moe.check.rules import rules_table
from spmd_moe.core.redistribute import moves_table
from spmd_moe.static.error_codes import codes_table
from tests.support.simulated_ranks import leave_world

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
FILES = ("spmd_moe", "examples", "typecheck", "tests")
# What mypy keeps between runs with a user's settings, which are not ours; tests share it.
GUEST_CACHE = ROOT / ".mypy_cache" / "guest"


@dataclass(frozen=True)
class Block:
    """A program, and what it prints or the error that ends it, where the README shows that."""

    number: int
    code: str
    shown: str | None


def blocks(text: str) -> Iterator[Block]:
    for number, match in enumerate(BLOCK.finditer(text), 1):
        yield Block(number, match[1], match[2])


def outcome(block: Block) -> str:
    """What the program prints; the message of ours that ends it, if one does."""
    printed = io.StringIO()
    program = compile(block.code, "program.py", "exec", dont_inherit=True)
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {"__name__": "program"})
    except SpmdMoeError as error:
        return f"{printed.getvalue()}{error}\n"
    finally:
        leave_world()
    return printed.getvalue()


def first_sentence(path: Path) -> str:
    """What a file says of itself in its first line."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return doc.partition("\n")[0].rstrip(".:")


def file_tree() -> str:
    lines: list[str] = []
    for folder in FILES:
        lines += ["", f"{folder}/"] if lines else [f"{folder}/"]
        for path in sorted((ROOT / folder).rglob("*.py"), key=lambda p: (len(p.parts), p)):
            if sentence := first_sentence(path):
                lines.append(f"  {path.relative_to(ROOT / folder)!s:<27} {sentence}")
    return "```text\n" + "\n".join(lines) + "\n```"


GENERATED = {"moves": moves_table, "rules": rules_table, "codes": codes_table, "files": file_tree}


@cache
def said_by_mypy() -> tuple[ModuleType, dict[str, str], str]:
    """The porting example, its files and the README's own module, and what mypy says of them."""
    spec = spec_from_file_location("porting", ROOT / "examples" / "03_porting.py")
    assert spec is not None and spec.loader is not None
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    sources: dict[str, str] = example.versions()
    with tempfile.TemporaryDirectory() as folder:
        files = {**sources, "my_layer": my_layer()}
        return example, sources, example.checked(Path(folder), files, GUEST_CACHE)


def my_layer() -> str:
    """The README's module with axes of its own names."""
    (found,) = [b.code for b in blocks(README.read_text()) if b.code.startswith("# my_layer.py")]
    return found


def porting() -> str:
    example, sources, said = said_by_mypy()
    lines = example.walk(sources, said)
    first = next(n for n, line in enumerate(lines) if line.startswith("typed.py"))
    return "\n".join(["```text", *lines[first:], "```"])


def own_names() -> str:
    lines = re.findall(r"(?:^|[/\\])(my_layer\.py:.*)", said_by_mypy()[2], re.M)
    return "\n".join(["```text", *lines, "```"])


SAID = {"porting": porting, "own names": own_names}  # these take seconds


def generated(text: str, makers: dict[str, Callable[[], str]] = GENERATED) -> str:
    """The README with its generated parts made anew."""
    for name, make in makers.items():
        text = filled(text, name, make())
    return text


def filled(text: str, name: str, new: str) -> str:
    """The README with something else between the marks of that name."""
    pattern = rf"(<!-- {name}:[^\n]*-->\n).*?(\n<!-- end of {name} -->)"
    text, found = re.subn(pattern, lambda m: m[1] + new + m[2], text, flags=re.S)
    assert found == 1, f"the README has no place for {name}"
    return text


def rewritten(text: str) -> str:
    for block in blocks(text):
        if block.shown is not None:
            old = f"```python\n{block.code}```\n\n```text\n{block.shown}```"
            text = text.replace(old, f"```python\n{block.code}```\n\n```text\n{outcome(block)}```")
    return generated(text)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    README.write_text(generated(rewritten(README.read_text()), SAID))
