"""Misuses of sharded dims (X7), and random numbers in what is the same on all ranks (X2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from spmd_moe.check import Layout, run_checks
from spmd_moe.check.target import Target
from tests.support import cut_dim_targets as t

Make = Callable[[t.Step], Target]
TP_2 = [Layout(tp=2)]

WRONG: dict[t.Step, tuple[Make, str]] = {
    t.own_rows_by_own_features: (t.of, "tp cuts dim 0 of f32[2, 8] and dim 0 of f32[8, 8]"),
    t.own_rows_by_own_features_einsum: (t.of, "tp cuts dim 0 of f32[2, 8] and dim 0 of f32[8, 8]"),
    t.own_rows_times_own_features: (t.of, "tp cuts dim 0 of f32[2, 1] and dim 0 of f32[8]"),
    t.other_rows_by_own_features: (t.of_own, "over tp, ranks have different rows of f32[4, 8]"),
    t.unflattened_as_the_whole: (t.of_sequences, "2 is the size of a whole dim, and dim 0 is cut"),
    t.one_head_is_left: (t.of, "to [4, 8] it mixes dim 1, of which this rank has a part"),
    t.halves_of_a_part: (t.of, "mul of f32[4, 4]: parts of dim 1 of [4, 8], of which this rank"),
    t.slices_of_a_part: (t.of, "mul of f32[4, 4]: parts of dim 1 of [4, 8], of which this rank"),
    t.narrowed_part: (t.of, "mul of f32[4, 4]: parts of dim 1 of [4, 8], of which this rank"),
    t.neighbors: (t.of, "sub of f32[1, 8]: parts of dim 0 of [2, 8], of which this rank"),
    t.rotated: (t.of, "cat of f32[4, 4]: parts of dim 1 of [4, 8], of which this rank"),
}
RIGHT: dict[t.Step, Make] = {
    t.all_rows_by_own_features: t.of,
    t.all_rows_by_own_features_einsum: t.of,
    t.received_rows_by_own_features: t.of_own,
    t.own_keys_first: t.of,
    t.unflattened_by_length: t.of_sequences,
    t.heads_side_by_side: t.of,
    t.halves_of_the_whole: t.of,
    t.pairs: t.of,
    t.rows_in_pieces: t.of,
    t.dropout_of_own_rows: t.of,
    t.noise_of_a_generator: t.of,
    t.dropout_of_a_seed: t.of,
    t.no_dropout: t.of,
}
RANDOM: dict[t.Step, str] = {
    t.dropout_of_the_same: "dropout draws f32[4, 8], which is R on tp",
    t.noise_on_the_same: "randn_like draws f32[4, 8], which is R on tp",
    t.noise_in_place: "exponential_ draws f32[4, 8], which is R on tp",
    t.noise_of_a_generator_of_the_rank: "normal_: ranks 0 and 1 do different things",
    t.dropout_of_a_seed_of_the_rank: "dropout: ranks 0 and 1 do different things",
}


@pytest.mark.parametrize("run", WRONG, ids=lambda run: run.__name__)
def test_it_is_found_where_it_is(run: t.Step) -> None:
    make, text = WRONG[run]
    report = run_checks(make(run), chosen=TP_2, tokens=(4,))
    first, *more = report.mistakes()
    line = int(first.finding.at.rpartition(":")[2])
    assert not more and first.finding.rule == "X7" and text in str(first), str(report)
    assert line in {line for _, _, line in run.__code__.co_lines()}


@pytest.mark.parametrize("run", RANDOM, ids=lambda run: run.__name__)
def test_random_numbers_of_one_rank_are_not_the_same_on_all(run: t.Step) -> None:
    (mistake,) = run_checks(t.of(run), chosen=TP_2, tokens=(4,)).mistakes()
    assert mistake.finding.rule == "X2" and RANDOM[run] in str(mistake), str(mistake)
    line = int(mistake.finding.at.rpartition(":")[2])
    assert line in {line for _, _, line in run.__code__.co_lines()}


@pytest.mark.parametrize("run", RIGHT, ids=lambda run: run.__name__)
def test_correct_code_is_found_correct(run: t.Step) -> None:
    report = run_checks(RIGHT[run](run), chosen=TP_2, tokens=(0, 1, 4))
    assert report.ok, str(report)
