"""Plain technical English: idioms that do not come back, in prose, errors and pages.

A reader of PyTorch's documentation reads a sentence once. Each pattern was found in a sentence that
had to be read twice; write the words of the right column instead.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.docs_blocks import ROOT

IDIOMS = {
    r"by itself\b": "default:, alone, on its own",
    r"\bbut for\b": "except for, except",
    r"\bsomebody|\bnobody|\banybody": "name who: the caller, a rank, the checker",
    r"\bwhatever\b|\bwhoever\b|\bwhichever\b": "any, every, all",
    r"what waits for backward": "activations saved for backward",
    r"\btold so\b|\btold alike\b|\bis told less\b": "is reported, raises",
    r"\banew\b": "again, new",
    r"\bfor ever\b": "never released",
    r"behind the \w+'s back": "without the checker seeing it",
    r"\bin the eyes of\b": "for, according to",
    r"\b(?:is|are) dear\b": "expensive",
    r"by other numbers|other numbers of": "a different number of",
    r"\bone's own\b|of a rank's own": "your own, its own",
    r"\bin vain\b": "without effect",
    r"\blest\b": "so that ... does not",
    r"\b[Ss]ay `\w+=": "pass",
    r"experts in turn": "round-robin",
    r"(?:config|message|table|program) says so": "if `option`, as the config sets it, reports it",
    r"\b(?:is|are) told (?:by|as|with|together|too)\b": "is reported, printed, raised",
    r"what (?:it|they|he) likes\b": "any",
    r"stands? in the (?:place|way) of": "replaces, prevents",
    r"of any kind, and of that kind": "the result has the kind of the argument",
    r"(?:has|have) been seen on a GPU|run on a GPU has been seen": "not run on a GPU yet",
    r"quarter of an hour": "15 minutes",
    # The sentences of the first reader, by their words.
    r"is what a sum over the ranks is taken in": "accumulation dtype of reductions",
    r"is trusted(?: and|,) not looked up": "is trusted: verifying it would need a collective",
    r"neither padded nor copied": "never padded or copied",
    r"is a piece of the same sequence": "a chunk of the same sequence",
    r"joined or cut on the way": "if src != dst changes the number of rows",
    r"totals by which its losses add up": "pass the totals of all micro-batches",
    r"is none, and divides nothing": "excluded from the average",
    r"takes such bits for NaN": "can report false NaNs",
    r"left over of a tensor": "the remainder",
    r"neither holds the other": "partially overlap",
    r"was used there for different tokens": "each rank saw different tokens",
    r"leaves out is as the run had it": "options you omit keep the resumed run's values",
    r"which have other tokens": "each rank has different tokens",
    r"what there is to edit": "placements",
    r"the same program in other words": "equivalent to the original",
    r"there is nothing to add up": "needs no reduction",
}
PATTERN = re.compile("|".join(f"(?:{idiom})" for idiom in IDIOMS))


def texts() -> dict[str, str]:
    """Everything that a person reads. What programs print on pages is checked where it is made."""
    found = {}
    for folder in ("spmd_moe", "tests", "examples", "typecheck", "docs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".txt") and path != Path(__file__):
                found[str(path.relative_to(ROOT))] = path.read_text()
    for path in (*ROOT.glob("*.md"), ROOT / "llms.txt"):
        found[path.name] = path.read_text()
    return {
        name: re.sub(r"```text\n.*?```", "", text, flags=re.S) if name.endswith(".md") else text
        for name, text in found.items()
    }


def lines_with_idioms(text: str) -> list[str]:
    """Lines, also where a sentence is wrapped."""
    found = []
    for match in PATTERN.finditer(re.sub(r"\s*\n\s*(?:#\s)?\s*", lambda m: " " * len(m[0]), text)):
        found.append(f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]}")
    return found


def test_idioms_do_not_come_back() -> None:
    found = {name: hits for name, text in texts().items() if (hits := lines_with_idioms(text))}
    assert found == {}


def test_the_rule_can_fail() -> None:
    assert lines_with_idioms("x\ny is made by\n    nobody, but for one") == [
        "3: nobody",
        "3: but for",
    ]
