"""Build the documentation: every warning is an error, and nothing is downloaded.

    python docs/build.py            # into docs/_build/html
    python docs/build.py FOLDER     # into another folder

It also writes llms.txt, the list of all pages for programs, into the site and, with --write,
into the root of the repository.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent


def main(words: list[str]) -> int:
    if "--write" in words:
        (ROOT / "llms.txt").write_text(llms_text())
        return 0
    target = Path(words[0]) if words else DOCS / "_build" / "html"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    status = subprocess.run([*command, "-d", str(target / ".doctrees"), str(DOCS), str(target)])
    if status.returncode == 0:
        (target / "llms.txt").write_text(llms_text())
        print(f"The pages are in {target}")
    return status.returncode


def llms_text() -> str:
    """Every page in the order of the contents, with its title and its first sentence."""
    index = (DOCS / "index.md").read_text()
    lines = ["# spmd_moe", "", f"> {first_sentence(index)}", ""]
    for caption, body in re.findall(r"```\{toctree\}\n:caption: (.*?)\n(.*?)```", index, re.S):
        lines += [f"## {caption}", ""]
        for name in names_in(body):
            lines += entries(name)
        lines.append("")
    return "\n".join(lines)


def entries(name: str) -> list[str]:
    """A page, and the pages of its own table of contents."""
    text = (DOCS / f"{name}.md").read_text()
    title = re.findall(r"^# (.*)", text, re.M)[0]
    found = [f"- [{title}](docs/{name}.md): {first_sentence(text)}"]
    for body in re.findall(r"```\{toctree\}\n(.*?)```", text, re.S):
        folder = name.rpartition("/")[0]
        for inner in names_in(body):
            found += entries(f"{folder}/{inner}")
    return found


def names_in(body: str) -> list[str]:
    """The pages of a table of contents."""
    return [line for line in body.splitlines() if line and not line.startswith(":")]


def first_sentence(text: str) -> str:
    """Of the first paragraph after the title."""
    body = text.partition("\n# ")[2] if text.startswith("---") else text
    paragraphs = [p for p in body.split("\n\n")[1:] if not p.startswith(("```", "#", "|", "<"))]
    words = " ".join(paragraphs[0].split())
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", words)
    return re.split(r"(?<=[.:]) ", words)[0].rstrip(":")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
