"""README and docs: programs print what is shown, tables are those of the code, the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import spmd_moe
from spmd_moe.check.rules import RULES
from spmd_moe.static.error_codes import STATIC_RULES
from tests.bench.train_layouts import LAYOUTS
from tests.support.docs_blocks import (
    DOCS,
    README,
    ROOT,
    Block,
    blocks,
    generated,
    outcome,
    pages,
    program,
    rewritten,
    with_reports,
)

TEXT = README.read_text()
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in pages()}
REWRITE = "python -m tests.support.docs_blocks --write"
HEADINGS = ["Bug and message", "Fix", "When to allow it", "What it cannot see"]


# --- programs and tables ----------------------------------------------------------------------


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python" in text])
def test_programs_print_what_is_shown(page: str) -> None:
    for block in blocks(PAGES[page]):
        got = outcome(block)  # an error that is not ours ends the test
        assert block.shown is None or got == block.shown, f"{block.code}\n{REWRITE}"


def test_tables_are_those_of_the_code() -> None:
    assert [name for name, text in PAGES.items() if generated(text) != text] == [], REWRITE


@pytest.mark.slow
def test_reports_of_mypy_are_shown() -> None:
    assert [name for name, text in PAGES.items() if with_reports(text) != text] == [], REWRITE
    porting = PAGES["docs/porting.md"]
    stale = porting.replace("x_TD is V and self.gate_ED is I on TP", "x_TD is V")
    assert stale != porting and with_reports(stale) == porting


def test_a_stale_page_is_found() -> None:
    text = PAGES["docs/placements.md"]
    stale = text.replace("all_reduce (P to I)", "all_reduce (P to R)")
    assert stale != text and generated(stale) == text
    wrong = text.replace("5 rows as [2, 2, 1, 0] - 2", "5 rows as [2, 2, 1, 0] - 3")
    assert wrong != text and rewritten(wrong) == text


def test_fragments_that_are_not_run_say_why() -> None:
    for name, text in PAGES.items():
        for match in re.finditer(r"```py\n", text):
            before = text[: match.start()].rstrip().splitlines()[-1]
            assert before.startswith("<!-- not run: "), f"{name}: {before}"


# --- pages ------------------------------------------------------------------------------------


TRACED = [
    r.id for r in RULES.values() if r.reports and {"traced", "source", "values"} & {*r.levels}
]


@pytest.mark.parametrize("rule", TRACED)
def test_each_rule_has_a_page_with_its_message(rule: str) -> None:
    text = PAGES[f"docs/rules/{rule}.md"]
    assert re.findall(r"^## (.*)", text, re.M) == HEADINGS
    shown = [block.shown or "" for block in blocks(text)]
    assert any(f"[{rule}] " in message for message in shown), shown


@pytest.mark.parametrize("code", STATIC_RULES)
def test_each_code_has_a_page_with_its_message(code: str) -> None:
    text = PAGES[f"docs/codes/placement-{code}.md"]
    assert re.findall(r"^## (.*)", text, re.M) == HEADINGS
    assert f"[placement-{code}]" in text


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"^\.\. auto\w+:: spmd_moe\.(\w+)$|^\.\. py:data:: (\w+)$", text, re.M)
    names = sorted(first or second for first, second in listed)
    assert names == sorted(vars(spmd_moe)["__all__"])


LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")


def broken_links(page: Path, text: str) -> list[str]:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    found = (match[1] for match in LINK.finditer(prose))
    return [link for link in found if "://" not in link and not (page.parent / link).exists()]


def test_links_lead_to_files() -> None:
    others = [ROOT / name for name in ("AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "llms.txt")]
    for page in [*pages(), *others]:
        assert broken_links(page, page.read_text()) == [], page
    assert broken_links(README, "[x](docs/nowhere.md) `[y](z)`") == ["docs/nowhere.md"]


def test_tables_of_numbers_say_date_and_command() -> None:
    for section in re.split(r"^## ", PAGES["docs/benchmarks.md"], flags=re.M)[1:]:
        assert re.search(r"\b20\d\d-\d\d-\d\d\b", section), section[:50]
        assert "python -m tests." in section and re.search(r"cores?|AMD|CPU", section), section[:50]


def test_losses_are_those_that_are_claimed() -> None:
    """By `tests/bench/train_layouts.py`: at least six agree in float32, and all in float64."""
    (table,) = re.findall(r"<!-- losses:.*?-->\n(.*?)\n\n", PAGES["docs/training.md"], re.S)
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == len(LAYOUTS) >= 6
    losses = [float(row[-3]) for row in rows]
    assert sum(abs(loss - losses[0]) <= 1e-4 for loss in losses) >= 6
    assert all(float(row[-1]) < 1e-10 for row in rows)


# --- the front page ---------------------------------------------------------------------------


def test_the_readme_is_short_and_opens_with_a_program_that_fails() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 200 and lines.index("```python") < 10
    (fix,) = re.findall(r"The fix is one argument: `(.*)`", TEXT)
    first = next(blocks(TEXT))
    failing = first.code.splitlines()[-1].partition("#")[0].strip()
    corrected = first.code.replace(failing, fix.replace("(x, ", "(torch.ones(5, 8), "))
    corrected = "from spmd_moe import ShardShape\n" + corrected
    assert outcome(Block(0, corrected, None)) == "" != outcome(first)


def test_optional_features_are_those_that_something_uses() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {
        name: [re.split(r"[<>=]", line)[0] for line in lines]
        for name, lines in extras["optional-dependencies"].items()
    }
    assert set(re.findall(r"\.\[(\w+)\]", TEXT)) == set(packages)
    code = "".join(
        p.read_text() for d in ("spmd_moe", "examples") for p in (ROOT / d).rglob("*.py")
    )
    used = set(re.findall(r"""find_spec\("(\w+)"\)""", code))
    assert {*packages["plot"], *packages["tensorboard"], *packages["mypy"]} <= used


# --- the site ---------------------------------------------------------------------------------


def test_drawings_are_those_of_the_program() -> None:
    draw = program(DOCS / "draw.py")
    for name, make in draw.PICTURES.items():
        assert (draw.STATIC / name).read_text() == make(), "python docs/draw.py --write"
    assert all(path.stat().st_size < 150_000 for path in draw.STATIC.iterdir())


def test_the_list_for_programs_is_fresh() -> None:
    assert (ROOT / "llms.txt").read_text() == program(DOCS / "build.py").llms_text(), (
        "python docs/build.py --write"
    )


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    begin = time.monotonic()
    command = [sys.executable, str(DOCS / "build.py"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("index.html", "llms.txt", "api/index.html", "rules/X1.html"):
        assert (tmp_path / "site" / name).exists(), name
    assert "redistribute" in (tmp_path / "site" / "api" / "core.html").read_text()
    print(f"{time.monotonic() - begin:.1f} s")
