"""The checker: what its rules find and allow, its exits, its reports, what it leaves behind."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist
from spmd_types import _checker, is_type_checking
from torch.overrides import _get_current_function_mode_stack

from spmd_moe.check import CannotCheckError, Layout, check, run_checks
from spmd_moe.check.command_line import main
from spmd_moe.check.signatures import signatures
from spmd_moe.check.trace import Configuration, standing, trace
from spmd_moe.core.errors import PlacementError
from tests.catalogue import targets
from tests.support import faulty_targets as t

TP_2, HERE = Layout(dp=2, tp=2), "tests.support.faulty_targets"


# --- rules ------------------------------------------------------------------------------------

WRONG: dict[Callable[..., torch.Tensor], str] = {
    t.chunked: "X2",
    t.ranged: "X2",
    t.scaled: "X2",
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
    ],
    ids=lambda run: run.__name__,
)
def test_correct_code_breaks_no_rule(run: Callable[..., torch.Tensor]) -> None:
    few = [Layout(), Layout(tp=4, ep=2, etp=2), Layout(dp=2, tp=2, ep=2)]
    report = run_checks(t.of(run), chosen=few)
    assert report.ok, str(report)


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


# --- annotations that cannot be read --------------------------------------------------------------

UNREAD = """\
from __future__ import annotations
from typing import TYPE_CHECKING
from torch import nn
from spmd_moe.check import Case
from spmd_moe.core.placement import DP, R, V, Placed
from tests.support import faulty_targets as t
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
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What cannot be read is no placement that could be trusted; what is no tensor needs none."""
    name = f"unread_{of_function}_{len(of_class)}"
    text = UNREAD.format(of_function=of_function, of_class=of_class)
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [f"{name}:target", "--layout", "dp 2 tp 2", "--jobs", "1"]
    assert main(["check", *words]) == (2 if said else 0), capsys.readouterr()
    error = capsys.readouterr().err
    assert said in error and ("TYPE_CHECKING" in error) is bool(said), error


# --- exits --------------------------------------------------------------------------------------


def run_cli(name: str, *words: str) -> int:
    return main(["check", f"{HERE}:{name}", "--jobs", "1", "--layout", "dp 2 tp 2", *words])


def test_exit_0_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("good") == 0
    assert "no mistake in 1 layout," in capsys.readouterr().out


def test_exit_1_shows_the_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("bad_sum") == 1
    out = capsys.readouterr().out
    assert (
        "[X12]" in out
        and "tests/support/faulty_targets.py:" in out
        and "why:" in out
        and "fix:" in out
    )


CANNOT = [
    (["tests.support.faulty_targets"], "does not have the form"),
    (["tests.no_such_module:target"], "cannot be imported"),
    ([f"{HERE}:no_such"], "has no callable 'no_such'"),
    ([f"{HERE}:raises"], "raises RuntimeError"),
    ([f"{HERE}:no_tensor"], "none of the arguments"),
    ([f"{HERE}:not_built"], "returns Module, not Case"),
    ([f"{HERE}:no_placement"], "without a placement"),
    ([f"{HERE}:elsewhere"], "lies on meta"),
    ([f"{HERE}:too_many_placements"], "2 placements are given for 1 arguments"),
    ([f"{HERE}:without_tp"], "dp:V cp:V, which says nothing of tp"),
    ([f"{HERE}:raises_on_tp"], "raises KeyError"),
    ([f"{HERE}:refuses"], "every layout is refused"),
    ([f"{HERE}:hangs", "--seconds", "1"], "takes more than 1 s"),
    ([f"{HERE}:good", "--junit", "/no/such/folder/x.xml"], "there is no directory"),
]


@pytest.mark.parametrize("words,said", CANNOT, ids=lambda value: str(value)[:40])
def test_exit_2_says_why(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    world = [] if "--world" in words else ["--world", "2"]
    assert main(["check", *words, *world, "--jobs", "1"]) == 2
    error = capsys.readouterr().err
    assert said in error and "why:" in error and "fix:" in error, error


NONSENSE = [
    *[("--layout", text) for text in ("dp", "dp 0", "pp 2", "dp 2 ep 3", "dp 2 dp 3")],
    ("--layout", "dp 99999999999999999999"),
    ("--layout", "dp 2000 tp 2000"),
    ("--layout", "dp \ud800"),
    ("--tokens", "-1"),
    ("--tokens", "9" * 5000),
    ("--world", "0"),
    ("--jobs", "0"),
    ("--seconds", "0"),
    ("--seconds", "nan"),
    ("--rank", "1"),
]


@pytest.mark.parametrize("option,value", NONSENSE, ids=lambda text: ascii(text)[:30])
def test_a_nonsense_value_of_an_option_is_one_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_cli("good", option, value)
    error = capsys.readouterr().err
    assert option in error and ascii(value)[:20] in error, error
    assert error.count("\n") == 1 and error.isascii() and len(error) < 300


def test_the_command_itself() -> None:
    words = [sys.executable, "-m", "spmd_moe", "check", f"{HERE}:bad_sum", "--layout", "tp 2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "[X12]" in done.stdout, done.stderr


# --- reports ------------------------------------------------------------------------------------


def test_json_is_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("bad_sum", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False and "X12" in {m["rule"] for m in said["mistakes"]}
    (layout,) = said["layouts"]
    assert layout["layout"] == "dp 2 tp 2 = edp 4" and layout["findings"] > 0


def test_junit_is_for_ci(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    assert run_cli("bad_sum", "--junit", str(path)) == 1
    suite = ElementTree.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    (case,) = suite
    assert case.get("name") == "dp 2 tp 2 = edp 4" and case[0].tag == "failure"


def test_it_is_the_same_every_time() -> None:
    one, two = (str(run_checks(t.bad_sum, chosen=[TP_2])).rpartition("(")[0] for _ in range(2))
    assert one == two


def test_check_raises_what_examine_reports() -> None:
    with pytest.raises(PlacementError, match=r"\[X12\]"):
        check(t.bad_sum, chosen=[TP_2])
    assert check(t.good, chosen=[TP_2]).ok


# --- what it leaves -----------------------------------------------------------------------------


def test_after_an_exception() -> None:
    assert not run_checks(t.failing, chosen=[TP_2]).ok
    with pytest.raises(CannotCheckError, match="raises RuntimeError"):
        run_checks(t.raises, chosen=[TP_2])


def test_after_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    try:
        assert run_cli("interrupted") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    assert run_cli("good") == 0


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
