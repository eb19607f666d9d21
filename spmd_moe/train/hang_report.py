"""Records of the ranks of a hanging job, and the message that is made from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import final

from spmd_moe.core.errors import explain
from spmd_moe.core.ranks_agree import ranks_by_text
from spmd_moe.train.hang_stack import Standing


class State(StrEnum):
    """The state of a rank, as it reports it."""

    RUNS = "runs"
    PAUSED = "paused"
    TELLS = "tells"  # it has printed its message, and is about to end
    LEFT = "left"
    RAISED = "raised"


@final
@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat of a rank, and where its main thread is."""

    number: int  # of this beat; a rank whose number stays the same has stopped
    state: State
    step: int
    pid: int
    host: str
    collective: str
    inside: str
    at: str

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> Beat:
        fields = json.loads(text)
        return Beat(**fields | {"state": State(fields["state"])})

    def __str__(self) -> str:
        return f"at step {self.step} {Standing(self.collective, self.inside, self.at)}"


@final
@dataclass(frozen=True, slots=True)
class FirstError:
    """The first error with which a rank has left the watch."""

    rank: int
    error: str


Beats = Mapping[int, Beat]  # by rank; a rank that never began has none


@final
@dataclass(frozen=True, slots=True)
class Ranks:
    """The last heartbeats of all ranks, as one rank has read them."""

    world: int
    beats: Beats
    stopped: frozenset[int]
    first_error: FirstError | None

    @staticmethod
    def of(world: int, before: Beats, now: Beats, first_error: FirstError | None) -> Ranks:
        """From two readings, far enough apart for every living rank to write."""
        stopped = {
            rank
            for rank, beat in now.items()
            if beat.state not in (State.LEFT, State.RAISED) and before.get(rank) == beat
        }
        return Ranks(world, now, frozenset(stopped), first_error)

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self.beats]

    def alive(self, *states: State) -> list[int]:
        """Ranks that run, in one of these states."""
        return [
            rank
            for rank, beat in self.beats.items()
            if rank not in self.stopped and beat.state in states
        ]

    @property
    def only_waits(self) -> bool:
        """Whether a rank is in a pause, and nothing else is wrong."""
        gone = self.stopped or self.first_error or self.missing
        return not gone and bool(self.alive(State.PAUSED))

    def at_fault(self) -> list[int]:
        """Ranks that have not arrived where others wait; empty if all wait."""
        if self.first_error is not None:
            return [self.first_error.rank]
        if self.stopped:
            return sorted(self.stopped)
        if self.missing:
            return self.missing
        left = [r for r, beat in self.beats.items() if beat.state in (State.LEFT, State.RAISED)]
        busy = [r for r, beat in self.beats.items() if not beat.collective and r not in left]
        return sorted(left or busy)


_SEQUENCES = "give all ranks of cp and tp the same number of sequences   # for balance='sequence'"


def message(mine: int, ranks: Ranks, seconds: float, longest: float) -> str:
    """What rank `mine` prints before it ends its process.

    Args:
        mine: This rank.
        ranks: All ranks.
        seconds: How long this rank has made no step.
        longest: The longest step that it has made, in seconds.
    """
    beat, guilty = ranks.beats[mine], ranks.at_fault()
    own = f"this rank has made no step for {seconds:.0f} s (its longest took {longest:.1f} s)"
    return explain(
        f"watch_hangs, rank {mine} of {ranks.world}",
        f"{own}; {_accused(ranks, guilty)}",
        why=ranks_by_text((rank, _line(ranks, rank)) for rank in range(ranks.world)),
        fixes=_fixes(ranks, guilty),
        at=beat.at,
    )


def store_is_silent(mine: int, world: int, beat: Beat, seconds: float, silent: float) -> str:
    """The message of a rank that cannot read the records of the others."""
    return explain(
        f"watch_hangs, rank {mine} of {world}",
        f"this rank has made no step for {seconds:.0f} s, and the store that connects the ranks "
        f"has not answered for {silent:.0f} s",
        why=f"the process that holds the store has stopped or cannot be reached: torchrun's agent "
        f"on the first host, or without torchrun rank 0; this rank stands {beat}",
        fixes=["ps -o pid,stat,cmd   # on the host of rank 0: T is stopped, D waits for a device"],
        at=beat.at,
    )


def _accused(ranks: Ranks, guilty: list[int]) -> str:
    who = _named(guilty)
    if ranks.first_error is not None:
        return f"rank {ranks.first_error.rank} raised {ranks.first_error.error}"
    if ranks.stopped:
        return f"{who} {_has(guilty)} stopped"
    if ranks.missing:
        return f"{who} never entered watch_hangs"
    if not guilty:
        return "all ranks wait in collectives, and none of these completes"
    return f"{who} {_has(guilty)} not arrived"


def _line(ranks: Ranks, rank: int) -> str:
    """The state of one rank as text. Ranks with equal texts are listed together."""
    beat, error = ranks.beats.get(rank), ranks.first_error
    if beat is None:
        return "never began"
    if rank in ranks.stopped:
        return f"no sign of life (stopped, or its Python is blocked); last seen {beat}"
    if beat.state is State.RAISED:
        same = error is not None and error.rank == rank
        return "has raised that error" if same else "has raised an error, later"
    if beat.state is State.LEFT:
        return f"has finished, after step {beat.step}"
    if beat.state is State.PAUSED:
        return f"in pause() {beat}"
    return str(beat)


def _fixes(ranks: Ranks, guilty: list[int]) -> list[str]:
    if ranks.first_error is not None:
        return ["read the traceback of that rank   # the others wait for it"]
    if not guilty:
        beats = ranks.beats.values()
        sizes = {b.collective for b in beats if "balance_losses.py" in b.inside}
        return [
            *([_SEQUENCES] if len(sizes) > 1 else []),
            "call the same collectives, of the same sizes, in the same order on all ranks",
        ]
    fixes = [
        f"py-spy dump --pid {ranks.beats[rank].pid}   # on {ranks.beats[rank].host}: rank {rank}"
        for rank in guilty[:1]
        if rank in ranks.beats
    ]
    if ranks.stopped or ranks.missing:
        return fixes or ["enter watch_hangs() on every rank of the job"]
    return [*fixes, "with watch.pause(): ...   # around work that takes longer than a step"]


def _named(ranks: Iterable[int]) -> str:
    """`rank 2`, `ranks 0, 1, 5`."""
    numbers = list(ranks)
    listed = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'' if len(numbers) == 1 else 's'} {listed}{more}"


def _has(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
