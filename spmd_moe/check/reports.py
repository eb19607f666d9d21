"""Reports of a check: for people, for machines (JSON), and for CI (JUnit)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final
from xml.etree import ElementTree

from spmd_moe.check.check_layout import Result
from spmd_moe.check.findings import Finding
from spmd_moe.check.trace import Configuration
from spmd_moe.core.errors import plural
from spmd_moe.core.messages import parts_of, printable


@final
@dataclass(frozen=True, slots=True)
class Mistake:
    """One finding, where it was seen first, and in how many configurations."""

    finding: Finding
    first: Configuration
    times: int

    def __str__(self) -> str:
        more = f" and {self.times - 1} more" if self.times > 1 else ""
        return f"{self.finding}\n  in:  {self.first}{more}"


@final
@dataclass(frozen=True, slots=True)
class Report:
    """The results of all layouts."""

    target: str
    results: tuple[Result, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not any(result.findings for result in self.results)

    def mistakes(self) -> list[Mistake]:
        """The findings, each kind once, with the first configuration that shows it."""
        seen: dict[tuple[str, str], list[tuple[Configuration, Finding]]] = {}
        for result in self.results:
            for configuration, finding in result.findings:
                seen.setdefault(finding.kind, []).append((configuration, finding))
        return [Mistake(found[0][1], found[0][0], len(found)) for found in seen.values()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, every_layout: bool = False) -> Iterator[str]:
        if every_layout:
            yield from (line(result) for result in self.results)
            yield ""
        for mistake in self.mistakes():
            yield f"{mistake}\n"
        yield self.summary()

    def summary(self) -> str:
        traced, refused = [r for r in self.results if r.traced], self._refused()
        runs, tensors = sum(r.traced for r in traced), sum(r.tensors for r in traced)
        untyped = sum(r.untyped for r in traced)
        said = "no mistake" if self.ok else plural(len(self.mistakes()), "mistake")
        passed = (
            f"{plural(len(traced), 'layout')}, {plural(runs, 'run')}, {plural(tensors, 'tensor')}"
        )
        passed += f", {untyped} of them untyped" if tensors else ": nothing was compared"
        last = f"; {plural(len(refused), 'layout')} refused by the target" if refused else ""
        return f"{self.target}: {said} in {passed}{last} ({self.seconds:.1f} s)"

    def _refused(self) -> Sequence[Result]:
        return [result for result in self.results if not result.traced]

    def to_json(self) -> str:
        found = [
            {
                "rule": m.finding.rule,
                "at": m.finding.at,
                **_file_and_line(m.finding.at),
                **parts_of(m.finding.text),
                "text": m.finding.text,
                "configuration": str(m.first),
                "times": m.times,
            }
            for m in self.mistakes()
        ]
        layouts = [
            {"layout": str(r.layout), "runs": r.traced, "findings": len(r.findings)}
            | ({"refused": r.refused} if r.refused else {})
            for r in self.results
        ]
        whole = {"target": self.target, "ok": self.ok, "seconds": round(self.seconds, 3)}
        return json.dumps(whole | {"mistakes": found, "layouts": layouts}, indent=2)

    def to_junit(self) -> str:
        """One test case for each layout."""
        suite = ElementTree.Element(
            "testsuite",
            name=f"spmd-moe check {printable(self.target)}",
            tests=str(len(self.results)),
            failures=str(sum(bool(r.findings) for r in self.results)),
            skipped=str(len(self._refused())),
            time=f"{self.seconds:.3f}",
        )
        for result in self.results:
            case = ElementTree.SubElement(
                suite, "testcase", classname=printable(self.target), name=str(result.layout)
            )
            if result.findings:
                configuration, finding = result.findings[0]
                fault = ElementTree.SubElement(case, "failure", message=f"[{finding.rule}]")
                fault.text = f"{finding}\n  in:  {configuration}"
            elif not result.traced:
                ElementTree.SubElement(case, "skipped", message=printable(result.refused))
        ElementTree.indent(suite)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _file_and_line(at: str) -> dict[str, object]:
    """Of `file:line`; a finding about a parameter or an output has no line."""
    file, _, line = at.rpartition(":")
    return {"file": file, "line": int(line)} if file and line.isdigit() else {}


def failed_json(target: str, text: str) -> str:
    """The report of a check that could not be done."""
    return json.dumps({"target": target, "ok": False, "error": text}, indent=2)


def failed_junit(target: str, text: str) -> str:
    """The same for CI: one test case that is in error."""
    counts = {"tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
    name = printable(target)
    suite = ElementTree.Element("testsuite", {"name": f"spmd-moe check {name}", **counts})
    case = ElementTree.SubElement(suite, "testcase", classname=name, name="could not check")
    ElementTree.SubElement(case, "error", message="could not check").text = text
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def first_line(text: str) -> str:
    """The first line, also of an empty text."""
    return text.partition("\n")[0]


def line(result: Result) -> str:
    """One layout."""
    if not result.traced:
        return f"refused  {result.layout}   {printable(first_line(result.refused))}"
    if not result.findings:
        return f"ok       {result.layout}   {plural(result.traced, 'run')}"
    rules = sorted({finding.rule for _, finding in result.findings})
    return f"FAILED   {result.layout}   {', '.join(rules)}"
