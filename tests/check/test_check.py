"""The checker: what its rules find and allow, its exits, its reports, what it leaves behind."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from spmd_types import _checker, is_type_checking
from torch.overrides import _get_current_function_mode_stack

from spmd_moe.check import CannotCheckError, Layout, check, observer, run_checks
from spmd_moe.check.follow_sharded_dims import give, keep_rows, rows_are_given
from spmd_moe.check.signatures import signatures
from spmd_moe.check.target import CheckerError
from spmd_moe.check.trace import Configuration, standing, trace
from spmd_moe.core.errors import PlacementError
from tests.catalogue import targets
from tests.support import faulty_targets as t
from tests.support.command_server import Commands, Done

TP_2, HERE = Layout(dp=2, tp=2), "tests.support.faulty_targets"


# --- rules ------------------------------------------------------------------------------------

WRONG: dict[Callable[..., torch.Tensor], str] = {
    t.chunked: "X2",
    t.ranged: "X2",
    t.scaled: "X2",
    t.numbered: "X2",
    t.factory_of_a_rank: "X2",
    t.number_of_a_rank: "X2",
    t.one_rank_alone: "X2",
    t.as_often_as_the_rank: "X2",
    t.scaled_by_an_item: "X2",
    t.factory_of_an_item: "X2",
    t.cut_by_an_item: "X2",
    t.branch_on_an_item: "X2",
    t.bare_sum: "X1",
    t.v_to_p: "X1",
    t.detached: "X3",
    t.of_data: "X3",
    t.under_no_grad: "X3",
    t.retyped: "X3",
    t.unchecked: "X3",
    t.softmax_of_a_shard: "X7",
    t.by_size: "X12",
    t.leaves_out_a_collective: "X10",
    t.fails_in_forward: "crash",
}


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> object:
    """No process group, mode, hook or patch outlives a check, however it ends."""
    before = _patched()
    yield
    assert not dist.is_initialized() and not is_type_checking()
    assert _get_current_function_mode_stack() == []
    assert before == _patched()


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    server = Commands()
    yield server
    server.close()


def _patched() -> tuple[object, ...]:
    spmd = torch.autograd.Function.apply, _checker._install_autograd_apply_patch
    return *spmd, t.Module.forward, dist.new_group, dist.device_mesh.new_group, sys.excepthook


def rules(run: Callable[..., torch.Tensor]) -> set[str]:
    """The rules that are broken in the lines of `run`, and none anywhere else."""
    report = run_checks(t.of(run), chosen=[TP_2, Layout()], tokens=(0, 1, 4))
    first = run.__code__.co_firstlineno
    lines = range(
        first, first + 1 + max(line or 0 for _, _, line in run.__code__.co_lines()) - first
    )
    found = set()
    for mistake in report.mistakes():
        file, _, line = mistake.finding.at.rpartition(":")
        inside = file.endswith("faulty_targets.py") and int(line) in lines
        if inside or mistake.finding.rule in ("X10", "X5"):
            found.add(mistake.finding.rule)
    return found


@pytest.mark.parametrize("run", WRONG, ids=lambda run: run.__name__)
def test_a_rule_finds_its_mistake_where_it_is(run: Callable[..., torch.Tensor]) -> None:
    assert WRONG[run] in rules(run), str(run_checks(t.of(run), chosen=[TP_2], tokens=(0, 1, 4)))


@pytest.mark.parametrize(
    "run",
    [
        t.shared_out,
        t.summed,
        t.softmax_beside_a_shard,
        t.room_for_own_rows,
        t.number_of_all_ranks,
        t.own_numbers,
        t.read_at_once,
    ],
    ids=lambda run: run.__name__,
)
def test_correct_code_breaks_no_rule(run: Callable[..., torch.Tensor]) -> None:
    few = [Layout(), Layout(tp=4, ep=2, etp=2), Layout(dp=2, tp=2, ep=2)]
    report = run_checks(t.of(run), chosen=few)
    assert report.ok, str(report)


def test_rows_are_not_matched_across_a_sum_over_them() -> None:
    """There may be as many experts as tokens."""
    x = torch.zeros(4, 4)
    give(x)
    one_expert, one_token, sent = x.sum(0), x.sum(1), torch.einsum("te,td->ed", x, x)
    keep_rows("sum", (x, 0), [x], [one_expert])
    keep_rows("sum", (x, 1), [x], [one_token])
    keep_rows("einsum", ("te,td->ed", x, x), [x, x], [sent])
    assert [rows_are_given(y) for y in (one_expert, one_token, sent)] == [False, True, False]


def test_numbers_of_a_rank_are_fixed_by_sharding_them() -> None:
    report = run_checks(t.of(t.numbered), chosen=[TP_2], tokens=(4,))
    assert "fix: own = redistribute(torch.arange(n), axis, src=R, dst=S(0))" in str(report)


ALLOWED = """\
import torch, spmd_types
from tests.support.faulty_targets import of
def run(m, x):
    # spmd: allow detach - to see that it can be
    y = x.detach()
    with spmd_types.no_typecheck():{reason}
        pass
    return x + y
target = of(run)
"""


@pytest.mark.parametrize(
    "reason,ok", [("  # spmd: allow no_typecheck - a reason", True), ("", False)]
)
def test_what_is_allowed_in_place(
    reason: str, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"allowing_{ok}"
    (tmp_path / f"{name}.py").write_text(ALLOWED.format(reason=reason))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__(name)
    report = run_checks(module.target, chosen=[TP_2], tokens=(4,), packages=[name])
    assert report.ok is ok, str(report)
    if not ok:
        assert [m.finding.rule for m in report.mistakes()] == ["X3"]


# --- declarations ---------------------------------------------------------------------------------

DECLARED = {
    "declared by name": (t.by_name("*"), ""),
    "a name of nothing": (t.by_name("wieght"), "'wieght' names no parameter or buffer of Linear"),
    "a name that is left out": (t.by_name("weight"), "'bias' f32[4] has no declared placement"),
    "a parameter without": (t.of_class(t.Undeclared), "'scale' f32[4] has no declared placement"),
    "misspelt in the class": (t.of_class(t.Misspelt), "'wieght' is declared dp:R cp:R tp:R, but"),
    "in part": (t.of_class(t.InPart), "weight f32[4, 4] is declared dp:R cp:R, and nothing on tp"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declarations_fail_closed(name: str) -> None:
    target, said = DECLARED[name]
    report = run_checks(target, chosen=[Layout(), TP_2], tokens=(4,))
    found = report.mistakes()
    assert [m.finding.rule for m in found] == ["X9"] * bool(said), str(report)
    assert all(said in str(m) for m in found), str(report)
    if name == "in part":
        assert "fix: Placed[Tensor, DP[R], CP[R], TP[R]]" in str(found[0])


# --- annotations that cannot be read --------------------------------------------------------------

UNREAD = """\
from __future__ import annotations
from typing import TYPE_CHECKING
from torch import nn
from spmd_moe.check import Case
from spmd_moe.core.placement import DP, R, V, Placed
from tests.support import faulty_targets as t
from tests.support.command_server import Commands, Done
if TYPE_CHECKING:
    from torch import Tensor
    from spmd_moe.core.placement import GatheredTokens, Whole
    from spmd_moe import MoEConfig
class Part(t.Module):
    config: MoEConfig
    {of_class}
    def forward(self, x: {of_function}) -> Tensor:
        return t.shared_out(self, nn.functional.linear(self.own(None, x), self.weight))
    def own(self, config: MoEConfig | None, x: Tensor) -> Tensor:
        return x
def target(mesh, tokens):
    import torch
    return Case(Part(mesh, t.shared_out), (torch.randn(tokens, 4),), (t.Whole,))
"""


@pytest.mark.parametrize(
    "of_function,of_class,said",
    [
        ("Tensor", "", ""),
        (
            "GatheredTokens",
            "",
            r"'x' is annotated 'GatheredTokens', in which a name does not exist",
        ),
        ("Tensor", "weight: Whole", "'weight' is annotated 'Whole', in which a name does not"),
    ],
)
def test_a_name_that_exists_for_type_checkers_only(
    of_function: str,
    of_class: str,
    said: str,
    tmp_path: Path,
    commands: Commands,
) -> None:
    """What cannot be read is no placement that could be trusted; what is no tensor needs none."""
    name = f"unread_{of_function}_{len(of_class)}"
    text = UNREAD.format(of_function=of_function, of_class=of_class)
    (tmp_path / f"{name}.py").write_text(text)
    words = [f"{name}:target", "--layout", "dp 2 tp 2", "--package", name]
    done = commands.run("check", *words, path=str(tmp_path))
    assert done.status == (2 if said else 0), done
    error = done.err
    assert said in error and ("TYPE_CHECKING" in error) is bool(said), error


# --- exits --------------------------------------------------------------------------------------


@pytest.fixture
def run_cli(commands: Commands) -> Callable[..., Done]:
    return lambda name, *words: commands.run(
        "check", f"{HERE}:{name}", "--layout", "dp 2 tp 2", *words
    )


def test_exit_0_says_what_was_done(run_cli: Callable[..., Done]) -> None:
    done = run_cli("good")
    assert done.status == 0 and "no mistake in 1 layout," in done.out


def test_exit_1_shows_the_mistake(run_cli: Callable[..., Done]) -> None:
    done = run_cli("bad_sum")
    assert done.status == 1 and "tests/support/faulty_targets.py:" in done.out
    assert all(part in done.out for part in ("[X12]", "why:", "fix:"))


def test_the_command_itself() -> None:
    words = [sys.executable, "-m", "spmd_moe", "check", f"{HERE}:bad_sum", "--layout", "tp 2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "[X12]" in done.stdout, done.stderr


# --- reports ------------------------------------------------------------------------------------


def test_json_is_for_machines(run_cli: Callable[..., Done]) -> None:
    done = run_cli("bad_sum", "--json")
    said = json.loads(done.out)
    assert done.status == 1
    assert said["ok"] is False and "X12" in {m["rule"] for m in said["mistakes"]}
    (found,) = [m for m in said["mistakes"] if m["rule"] == "X12"]
    assert found["file"] == "tests/support/faulty_targets.py" and found["line"] > 100
    assert found["message"].startswith("sum: it gives ") and found["why"].endswith(".")
    assert found["fixes"] and found["text"].startswith(found["message"])
    (layout,) = said["layouts"]
    assert layout["layout"] == "dp 2 tp 2 = edp 4" and layout["findings"] > 0


def test_junit_is_for_ci(tmp_path: Path, run_cli: Callable[..., Done]) -> None:
    path = tmp_path / "report.xml"
    assert run_cli("bad_sum", "--junit", str(path)).status == 1
    suite = ElementTree.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    (case,) = suite
    assert case.get("name") == "dp 2 tp 2 = edp 4" and case[0].tag == "failure"


def test_it_is_the_same_every_time() -> None:
    one, two = (str(run_checks(t.bad_sum, chosen=[TP_2])).rpartition("(")[0] for _ in range(2))
    assert one == two


def test_check_raises_what_run_checks_reports() -> None:
    with pytest.raises(PlacementError, match=r"\[X12\]"):
        check(t.bad_sum, chosen=[TP_2])
    assert check(t.good, chosen=[TP_2]).ok


@pytest.mark.parametrize("name", ["follow", "descend"])
def test_a_defect_of_the_checker_is_not_the_modules(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is no finding: nothing was checked."""

    def fail(*args: object) -> None:
        raise KeyError("a defect")

    fail.__code__ = fail.__code__.replace(co_filename=observer.__file__)
    monkeypatch.setattr(observer, name, types.FunctionType(fail.__code__, vars(observer)))
    with pytest.raises(CheckerError, match=r"the checker itself fails at .*: KeyError: 'a defect'"):
        run_checks(t.good, chosen=[TP_2])


# --- what it leaves -----------------------------------------------------------------------------


def test_after_an_exception() -> None:
    assert not run_checks(t.failing, chosen=[TP_2]).ok
    with pytest.raises(CannotCheckError, match="raises RuntimeError"):
        run_checks(t.raises, chosen=[TP_2])


def test_after_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_checks(t.interrupted, chosen=[TP_2])
    assert run_checks(t.good, chosen=[TP_2]).ok


def test_a_target_that_leaves_is_not_one_that_passes() -> None:
    with pytest.raises(CannotCheckError, match=r"it raises SystemExit\(0\)"):
        run_checks(t.leaves, chosen=[TP_2])


def test_the_random_numbers_of_the_program_go_on() -> None:
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    run_checks(t.good, chosen=[TP_2])
    assert torch.equal(torch.rand(3), want)


def test_checks_do_not_disturb_each_other() -> None:
    alone = [str(r).rpartition("(")[0] for r in (run_checks(t.bad_sum, chosen=[TP_2]),)]
    assert run_checks(t.good, chosen=[TP_2]).ok
    assert str(run_checks(t.bad_sum, chosen=[TP_2])).rpartition("(")[0] == alone[0]


def test_a_thread_that_is_no_main_thread_may_check() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(run_checks(t.good, chosen=[TP_2]).ok))
    thread.start()
    thread.join()
    assert found == [True]


# --- speed --------------------------------------------------------------------------------------


def seconds(act: Callable[[], object]) -> float:
    """Of this process, not of what else the machine does."""
    begin = time.process_time()
    act()
    return time.process_time() - begin


def test_a_world_of_8192_ranks() -> None:
    """Ten seconds of this process are the most that may be asked; two is what it takes."""
    wide = Layout(dp=1024, tp=8, ep=64, etp=2)
    assert seconds(lambda: check(t.good, chosen=[wide], tokens=(9,))) < 10


def test_one_trace_is_quick() -> None:
    layout = Layout(dp=2, tp=2, ep=2)
    with signatures({"spmd_moe", "tests"}), standing(layout, 0) as here:
        act = functools.partial(trace, targets.layer, Configuration(layout, 24), {"spmd_moe"}, here)
        act()
        spent = min(seconds(act) for _ in range(5))
    assert spent < 0.15
