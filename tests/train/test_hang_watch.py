"""If a rank stops, every rank that waits for it prints its number, and the job ends."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable

import pytest

from spmd_moe import ConfigError, watch_hangs
from spmd_moe.train.hang_report import Beat, FirstError, Ranks, State, message
from spmd_moe.train.hang_watch import HangWatch
from tests.support import hanging_jobs, refused_on_one_rank
from tests.support.hanging_jobs import train, with_a_store_in_rank_0
from tests.support.workers import WorkersError, run

SECONDS = 2.0


def line_of(act: Callable[[], object]) -> str:
    """A pattern for the lines of a function of hanging_jobs.py."""
    first = act.__code__.co_firstlineno
    numbers = range(first, first + 5)
    return rf"tests/support/hanging_jobs\.py:({'|'.join(map(str, numbers))})\b"


def printed(error: WorkersError) -> dict[int, str]:
    """What each rank printed."""
    texts = re.split(r"^---- rank (\d) printed ----$", str(error), flags=re.M)[1:]
    return {int(rank): text for rank, text in zip(texts[::2], texts[1::2], strict=True)}


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("act", ["stops", "loops", "locks"])
def test_a_rank_that_does_not_arrive(act: str) -> None:
    with pytest.raises(WorkersError, match="rank 0 died with exit code 75") as caught:
        run(2, train, act, 1, SECONDS)
    said = printed(caught.value)
    first, why, *_ = said[0].strip().splitlines()
    took = re.search(r"has made no step for (\d+) s", first)
    assert took and int(took[1]) <= SECONDS + 10
    if act == "stops":
        assert first.endswith("; rank 1 has stopped.") and 1 not in said
        assert re.search(r"no sign of life .*; last seen at step \d .* on ranks \[1\]", why)
    else:
        assert first.endswith("; rank 1 has not arrived.")
        assert "rank 1 died with exit code 75" in str(caught.value)
        assert said[1].splitlines()[2] == why, "both ranks see the same"
        line = line_of(hanging_jobs.ACTS[act])
        assert re.search(rf"at step 6 outside of collectives, called at {line} on ranks \[1\]", why)
    assert re.search(r"at step 6 in all_to_all of i64\[2, 6\], in _by_kind .* on ranks \[0\]", why)
    assert "spmd_moe/" in why and all(text.count("watch_hangs,") == 1 for text in said.values())


@pytest.mark.gloo
@pytest.mark.slow
def test_a_rank_that_raises() -> None:
    """Its process goes on, as those of a notebook do, so no connection is closed."""
    with pytest.raises(WorkersError, match="rank 1 did not answer") as caught:
        run(3, raises_and_stays, SECONDS)
    said = printed(caught.value)
    for rank in (0, 2):
        head = said[rank].strip().splitlines()[0]
        assert head.endswith("; rank 1 raised ValueError: the seventh sample is damaged.")
        assert f"rank {rank} died with exit code 75" in str(caught.value)


def raises_and_stays(seconds: float) -> None:
    try:
        train("raises", 1, seconds, where="backward")
    except ValueError:
        time.sleep(30)


@pytest.mark.gloo
@pytest.mark.slow
def test_a_rank_that_has_finished_before_the_others() -> None:
    with pytest.raises(WorkersError, match="rank 0 died with exit code 75") as caught:
        run(2, leaves_and_stays, SECONDS)
    head, why, *_ = printed(caught.value)[0].strip().splitlines()
    assert head.endswith("; rank 1 has not arrived.")
    assert "has finished, after step 7 on ranks [1]" in why


def leaves_and_stays(seconds: float) -> None:
    train("leaves early", 1, seconds)
    time.sleep(12)


@pytest.mark.gloo
@pytest.mark.slow
def test_the_store_stops_with_rank_0() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(WorkersError, match="rank 1 died with exit code 75") as caught:
        run(2, with_a_store_in_rank_0, port, SECONDS)
    text = printed(caught.value)[1]
    assert "the store that connects the ranks has not answered for" in text
    assert "without torchrun rank 0; this rank stands at step 6 in all_to_all of" in text


@pytest.mark.gloo
@pytest.mark.slow
def test_no_alarm() -> None:
    """A pause of one rank that is longer than the time limit, and ranks that all go on."""
    assert run(2, train, "sleeps", 1, SECONDS / 2, "pause") == ["done", "done"]


# --- input that one rank refuses, of which the layer tells the others nothing -------------------


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize(
    ("name", "raised"),
    [
        ("fixed_capacity", "ShapeError: MoE.forward: x f32[4, 9] does not end in the layer's dim"),
        ("compiled_local", "ShapeError: MoE.forward: x f32[4, 9] does not end in the layer's dim"),
        ("fsdp_casts", "DtypeError: MoE.forward: x is i64[4, 8]"),
    ],
)
def test_input_that_one_rank_refuses(name: str, raised: str) -> None:
    with pytest.raises(WorkersError, match="rank 0 died with exit code 75") as caught:
        # The first step compiles, and a rank waits for its longest step and SECONDS more.
        run(2, refused_on_one_rank.train, name, SECONDS, 200.0, timeout=240.0)
    head = printed(caught.value)[0].strip().splitlines()[0]
    assert f"; rank 1 raised {raised}" in head


@pytest.mark.gloo
@pytest.mark.slow
def test_numbers_of_sequences_that_differ() -> None:
    with pytest.raises(WorkersError, match="rank 1 died with exit code 75") as caught:
        run(2, refused_on_one_rank.train, "sequences", SECONDS, 30.0)
    for text in printed(caught.value).values():
        assert "all ranks wait in collectives, and none of these completes." in text
        assert "all_reduce of i64[2, 4], in balance_loss" in text and "all_reduce of i64[3]" in text
        fix = "give all ranks of cp and tp the same number of sequences   # for balance='sequence'"
        assert f"  fix: {fix}" in text


# --- the message -------------------------------------------------------------------------------


def beat(number: int, state: State = State.RUNS, collective: str = "", step: int = 7) -> Beat:
    return Beat(number, state, step, 4321, "node3", collective, "", "train.py:41")


WAITS = beat(9, collective="all_reduce")


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({1: WAITS}, "all ranks wait in collectives, and none of these completes"),
        ({1: beat(9)}, "rank 1 has not arrived"),
        ({1: beat(5)}, "rank 1 has stopped"),
        ({1: beat(5), 2: beat(5)}, "ranks 1, 2 have stopped"),
        ({1: beat(5, State.LEFT)}, "rank 1 has not arrived"),
        ({}, "rank 1 never entered watch_hangs"),
    ],
)
def test_who_is_told(others: dict[int, Beat], says: str) -> None:
    before = {rank: beat(5, other.state) for rank, other in others.items()}
    now = {0: WAITS, **others}
    ranks = Ranks.of(max(2, len(now)), {0: beat(5), **before}, now, None)
    text = message(0, ranks, 31.2, 0.25)
    own = "this rank has made no step for 31 s (its longest took 0.2 s)"
    assert text.splitlines()[0] == f"watch_hangs, rank 0 of {ranks.world}: {own}; {says}."
    assert [line[2:5] for line in text.splitlines()[1:]] in (
        ["why", "fix", "at:"],
        ["why", "fix", "fix", "at:"],
    )


def test_a_pause_excuses_ranks_that_live() -> None:
    paused = Ranks.of(2, {}, {0: WAITS, 1: beat(6, State.PAUSED)}, None)
    assert paused.only_waits
    same = beat(6, State.PAUSED)
    assert not Ranks.of(2, {1: same}, {0: WAITS, 1: same}, None).only_waits
    assert not Ranks.of(2, {}, paused.beats, FirstError(1, "ValueError: x")).only_waits


def test_a_beat_travels_as_text() -> None:
    assert Beat.decode(WAITS.encode().encode()) == WAITS


# --- one process -------------------------------------------------------------------------------


def test_one_process_is_not_watched() -> None:
    with watch_hangs(seconds=0.01) as watch:
        time.sleep(0.1)
        watch.step()
    assert watch.steps == 1 and watch.longest >= 0.1


def test_the_limit_follows_the_longest_step() -> None:
    watch = HangWatch(30.0, 300.0)
    assert watch.limit == 300.0
    watch.since -= 12
    watch.step()
    assert 42.0 <= watch.limit < 43.0
    watch.step()
    assert watch.limit >= 42.0


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "30"])
def test_a_time_that_is_none(seconds: float) -> None:
    match = "seconds is .*; it must be a positive number of seconds"
    with pytest.raises(ConfigError, match=match), watch_hangs(seconds=seconds):
        raise AssertionError
