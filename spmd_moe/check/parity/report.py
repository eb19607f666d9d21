"""What parity says: to people and to machines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from spmd_moe.check.parity.cpu_stand_ins import STAND_INS
from spmd_moe.check.parity.merge_findings import Cause, merged
from spmd_moe.check.parity.sweep import Outcome
from spmd_moe.core.messages import plural


@final
@dataclass(frozen=True, slots=True)
class ParityReport:
    """The outcomes of all configurations."""

    target: str
    outcomes: tuple[Outcome, ...]
    stand_ins: tuple[str, ...]
    notes: tuple[str, ...]  # of an adapter
    ways: tuple[str, ...]  # how ranks ran, unless all ran as threads
    seconds: float

    @property
    def ok(self) -> bool:
        """Compared, with nothing wrong and nothing left undone."""
        return self.status == 0

    @property
    def status(self) -> int:
        """0: outputs and gradients are those of one process; 1: they differ; 2: not known."""
        if any(outcome.causes for outcome in self.outcomes):
            return 1
        alive = self.compared - len(self.dead)
        return 2 if alive <= 0 or any(o.failed for o in self.outcomes) else 0

    @property
    def compared(self) -> int:
        return sum(o.compared.tensors for o in self.outcomes if o.compared is not None)

    @property
    def dead(self) -> list[str]:
        """Tensors that were zero on both sides, once for each configuration."""
        found = [o.compared.dead for o in self.outcomes if o.compared is not None]
        return [name for names in found for name in names]

    def causes(self) -> list[Cause]:
        return merged([cause for outcome in self.outcomes for cause in outcome.causes])

    def findings(self) -> list[str]:
        """Each cause as a text of five parts, and where it occurs."""
        ran = [o.question for o in self.outcomes if o.compared is not None]
        return [cause.text(ran) for cause in self.causes()]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        for text in self.findings():
            yield f"{text}\n"
        for text, questions in self._failures().items():
            yield f"could not compare {questions[0]}{self._more(questions)}\n{text}\n"
        for note in (*self.ways, *self._notes()):
            yield f"note: {note}"
        for name in self.stand_ins:
            yield f"stand-in: {STAND_INS[name][1]}"
        yield from (f"stand-in: {note}" for note in self.notes)
        yield self.summary()

    def _failures(self) -> dict[str, list[object]]:
        found: dict[str, list[object]] = {}
        for outcome in self.outcomes:
            if outcome.failed:
                found.setdefault(outcome.failed, []).append(outcome.question)
        return found

    def _more(self, questions: Sequence[object]) -> str:
        return f" and {len(questions) - 1} more" if len(questions) > 1 else ""

    def _notes(self) -> list[str]:
        every = [n for o in self.outcomes if o.compared is not None for n in o.compared.notes]
        dead = sorted(set(self.dead))
        if dead:
            every.append(f"zero on both sides: {', '.join(dead[:6])}{' ..' if dead[6:] else ''}")
        return list(dict.fromkeys(every))

    def summary(self) -> str:
        ran = [o for o in self.outcomes if o.compared is not None]
        refused = [o for o in self.outcomes if o.refused]
        failed = [o for o in self.outcomes if o.failed]
        said = plural(len(self.causes()), "finding") if self.causes() else "no finding"
        if self.status == 2:
            said = "nothing could be compared" if not ran else "not all could be compared"
            said = "every compared tensor is zero" if ran and not failed else said
        text = f"{self.target}: {said} in {plural(len(ran), 'run')}; "
        text += f"{plural(self.compared, 'tensor')} compared, {len(self.dead)} zero on both sides"
        if refused:
            text += f"; {len(refused)} refused by the target"
        if failed:
            text += f"; {len(failed)} could not be compared"
        return f"{text} ({self.seconds:.1f} s)"

    def to_json(self) -> str:
        ran = [o.question for o in self.outcomes if o.compared is not None]
        found = [
            {
                "tensors": [d.title for d in cause.differences],
                "ranks": list(cause.differences[0].ranks),
                "norms": list(cause.differences[0].norms),
                "right": cause.differences[0].story.text if cause.differences[0].story else None,
                "at": cause.at,
                "in": [str(q) for q in cause.seen],
                "text": cause.text(ran),
            }
            for cause in self.causes()
        ]
        runs = [
            {
                "configuration": str(o.question),
                "compared": o.compared.tensors if o.compared else 0,
                "zero": len(o.compared.dead) if o.compared else 0,
                "findings": len(o.causes),
                "seconds": round(o.seconds, 3),
            }
            | ({"refused": o.refused} if o.refused else {})
            | ({"failed": o.failed} if o.failed else {})
            for o in self.outcomes
        ]
        whole = {
            "target": self.target,
            "status": self.status,
            "notes": [*self.ways],
            "seconds": round(self.seconds, 3),
        }
        return json.dumps(whole | {"findings": found, "runs": runs}, indent=2)


def line(outcome: Outcome) -> str:
    """One configuration."""
    if outcome.refused:
        return f"refused  {outcome.question}   {outcome.refused}"
    if outcome.compared is None:
        return f"NOT RUN  {outcome.question}   {outcome.failed.splitlines()[0]}"
    took = f"{plural(outcome.compared.tensors, 'tensor')} ({outcome.seconds:.2f} s)"
    if outcome.causes:
        names = ", ".join(cause.differences[0].title for cause in outcome.causes)
        return f"DIFFERS  {outcome.question}   {names}; {took}"
    return f"ok       {outcome.question}   {took}"
