"""The command line: it always ends, and its status is true, for every target."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spmd_moe.check import Layout, command_check
from spmd_moe.check.check_layout import Result
from spmd_moe.check.rules import RULES
from spmd_moe.check.target import COMMAND_LINE, accounted
from spmd_moe.core.errors import PlacementError, explain
from tests.check.fuzz_targets import Hostile, fuzz, verify
from tests.support.command_server import Commands, Done

ROOT = Path(__file__).resolve().parents[2]
HOSTILE, FAULTY = "tests.support.hostile_targets", "tests.support.faulty_targets"
FILE = "tests/support/hostile_targets.py"
LIMIT = 2.0  # seconds for one step of a hostile target

# What a target does, and where; the status, and what is said of it.
ENDS = {
    "build_loops": "it takes more than 2 s while it starts",
    "build_swallows": "it takes more than 2 s while it starts",
    "build_exits": "it raises SystemExit(0)",
    "build_exits_at_once": "its process exits with status 0 while it starts",
    "build_is_killed": "its process is ended by SIGKILL while it starts",
    "build_segfaults": "its process is ended by SIGSEGV while it starts",
    "build_is_odd": "it raises OddError('odd')",
    "build_interrupts": "it raises KeyboardInterrupt()",
    "build_asks": "it raises EOFError",
    "build_says_odd_things": "raises RuntimeError",
    "build_says_much": "raises RuntimeError",
    "forward_loops": "it takes more than 2 s while checking dp 2 tp 2",
    "forward_swallows": "it takes more than 2 s while checking dp 2 tp 2",
    "forward_ignores_alarms": "it takes more than 2 s while checking dp 2 tp 2",
    "forward_forks": "it takes more than 2 s while checking dp 2 tp 2",
    "forward_exits": "it raises SystemExit(0)",
    "forward_exits_at_once": "its process exits with status 0 while checking dp 2 tp 2",
    "forward_is_killed": "its process is ended by SIGKILL while checking dp 2 tp 2",
    "forward_segfaults": "its process is ended by SIGSEGV while checking dp 2 tp 2",
    "forward_is_odd": "it raises OddError('odd')",
    "forward_interrupts": "it raises KeyboardInterrupt()",
    "breaks_the_checker": "the checker itself fails at spmd_moe/",
}
# What is found of those whose process survives.
FINDS = {
    "forward_prints": 0,
    "forward_closes": 0,
    "build_prints": 0,
    "build_closes": 0,
    "forward_asks": 1,
    "forward_says_odd_things": 1,
    "forward_says_much": 1,
}
# Targets that are none, and how the message helps.
NONE = {
    "of_mesh_alone": ("it takes (mesh), and a target takes (mesh, tokens)", "def target(mesh,"),
    "factory": ("it returns a function, not a Case", "my_target = make_target(...)"),
    "without_the_comma": ("args is f32[3, 8], not a tuple", "needs its comma: (x,)"),
    "of_a_function": ("module is of type function, not an nn.Module", "Case(module, (x,)"),
}
CANNOT = [
    (["tests.support.faulty_targets"], "does not have the form"),
    (["tests.no_such_module:target"], "cannot be imported"),
    (["tests/no_such_file.py:target"], "there is no file 'tests/no_such_file.py'"),
    ([f"{FAULTY}:no_such"], "has no callable 'no_such'"),
    ([f"{FAULTY}:raises"], "raises RuntimeError"),
    ([f"{FAULTY}:no_tensor"], "none of the arguments"),
    ([f"{FAULTY}:not_built"], "returns Module, not Case"),
    ([f"{FAULTY}:no_placement"], "without a placement"),
    ([f"{FAULTY}:elsewhere"], "lies on meta"),
    ([f"{FAULTY}:too_many_placements"], "2 placements for 1 argument"),
    ([f"{FAULTY}:without_tp"], "dp:V cp:V, which says nothing of tp"),
    ([f"{FAULTY}:raises_on_tp"], "raises KeyError"),
    ([f"{FAULTY}:refuses"], "every layout is refused"),
    ([f"{FAULTY}:good", "--junit", "/no/such/folder/x.xml"], "cannot be written"),
]
NONSENSE = [
    *[("--layout", text) for text in ("dp", "dp 0", "pp 2", "dp 2 ep 3", "dp 2 dp 3")],
    ("--layout", "dp 99999999999999999999"),
    ("--layout", "dp 2000 tp 2000"),
    ("--tokens", "-1"),
    ("--tokens", "9" * 5000),
    ("--world", "0"),
    ("--jobs", "0"),
    ("--seconds", "0"),
    ("--seconds", "nan"),
]
FEW = ("--layout", "dp 2 tp 2")


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    server = Commands()
    yield server
    server.close()


@pytest.fixture(scope="module")
def done(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every command of this file, a few at a time; each test then looks at one."""
    folder = tmp_path_factory.mktemp("reports")
    asked: dict[str, list[str]] = {}
    for name in (*ENDS, *FINDS, *NONE):
        report = ["--json", "--junit", str(folder / f"{name}.xml")]
        limit = ["--seconds", f"{LIMIT:g}"] if "more than" in ENDS.get(name, "") else []
        asked[name] = ["check", f"{HOSTILE}:{name}", *FEW, *limit, *report]
    for words, said in CANNOT:
        asked[said] = ["check", *words, "--world", "2", "--jobs", "1"]
    for option, value in NONSENSE:
        asked[f"{option} {value}"] = ["check", f"{FAULTY}:good", *FEW, option, value]
    asked |= {
        "several": ["check", f"{HOSTILE}:forward_is_killed", "--world", "4", "--jobs", "2"],
        "copies": ["check", f"{HOSTILE}:forward_forks_once", *FEW, "--layout", "dp 2", "--json"],
        "path": ["check", f"{FAULTY.replace('.', '/')}.py:good", *FEW],
        "values": ["check", f"{HOSTILE}:raw_exchange", "--values", *FEW],
        "plan": ["plan", f"{HOSTILE}:build_exits"],
        "help": ["--help"],
        "check help": ["check", "--help"],
    }
    found = commands.run_all(asked.values())
    return dict(zip(asked, found, strict=True)) | {"folder": Done(None, str(folder), "")}


def report(done: dict[str, Done], name: str) -> ElementTree.Element:
    return ElementTree.parse(Path(done["folder"].out) / f"{name}.xml").getroot()


@pytest.mark.parametrize("name", ENDS)
def test_a_check_that_could_not_be_done_says_so(name: str, done: dict[str, Done]) -> None:
    one = done[name]
    said = json.loads(one.out)
    assert one.status == 2, one
    assert said["ok"] is False and ENDS[name] in said["error"], said
    assert "Traceback" not in one.err and said["error"] in one.err
    assert f"at:  {FILE}:" in said["error"]
    assert report(done, name).get("errors") == "1"


@pytest.mark.parametrize("name", FINDS)
def test_what_a_target_prints_and_says_reaches_no_report(name: str, done: dict[str, Done]) -> None:
    one = done[name]
    assert one.status == FINDS[name], one.err[:2000]
    assert json.loads(one.out)["ok"] is (one.status == 0) and len(one.out) < 20_000
    assert report(done, name).get("failures") == str(one.status)
    if "odd_things" in name:
        assert r"bell \x07 escape \x1b[2J nul \x00 <b>&amp; ]]> \ufffe \ud83d" in json.loads(
            one.out
        )["mistakes"][0]["text"].replace("\\\\", "\\")


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_target_is_told_what_was_meant(name: str, done: dict[str, Done]) -> None:
    one = done[name]
    assert one.status == 2 and all(part in one.err for part in NONE[name]), one.err
    assert f"at:  {FILE}:" in one.err


@pytest.mark.parametrize("said", [said for _, said in CANNOT])
def test_exit_2_says_why(said: str, done: dict[str, Done]) -> None:
    one = done[said]
    assert one.status == 2 and said in one.err, one
    assert all(part in one.err for part in ("why:", "fix:", "at: ")) and "spmd-moe:8" not in one.err


@pytest.mark.parametrize("option,value", NONSENSE, ids=lambda text: ascii(text)[:30])
def test_a_nonsense_value_of_an_option_is_one_line(
    option: str, value: str, done: dict[str, Done]
) -> None:
    one = done[f"{option} {value}"]
    assert one.status == 2 and option in one.err and ascii(value)[:20] in one.err, one
    assert one.err.count("\n") == 1 and one.err.isascii() and len(one.err) < 300


def test_a_lost_process_among_several_ends_the_check(done: dict[str, Done]) -> None:
    assert done["several"].status == 2 and "ended by SIGKILL" in done["several"].err


def test_a_copy_of_a_process_is_not_listened_to(done: dict[str, Done]) -> None:
    said = json.loads(done["copies"].out)
    assert [layout["layout"] for layout in said["layouts"]] == ["dp 2 tp 2 = edp 4", "dp 2 = edp 2"]


def test_a_path_names_a_module(done: dict[str, Done]) -> None:
    assert done["path"].status == 0, done["path"].err


def test_a_raw_collective_runs_in_the_lone_process_too(done: dict[str, Done]) -> None:
    assert done["values"].status == 0, done["values"]


def test_a_plan_of_a_target_that_leaves(done: dict[str, Done]) -> None:
    assert done["plan"].status == 2 and "SystemExit(0)" in done["plan"].err


def test_an_error_outside_of_the_users_code_is_at_the_target() -> None:
    error = PlacementError(explain("obligations", "it says nothing", why="", at=COMMAND_LINE))
    assert str(accounted(error, "my.py:3")).endswith("\n  at:  my.py:3")


def test_help_teaches(done: dict[str, Done]) -> None:
    assert done["help"].status == done["check help"].status == 0
    text = " ".join(done["check help"].out.split())
    for rule in RULES.values():
        assert (f"{rule.id} {rule.demands}" in text) is rule.reports, rule
        assert all(word in text for word in rule.words)
    assert "exit status: 0 nothing found" in text and "examples:" in text
    assert "examples:" in done["help"].out


def test_random_targets_end_with_a_true_status_and_one_clear_message(
    commands: Commands, tmp_path: Path
) -> None:
    counts = fuzz(commands, tmp_path, 0, times=32)
    assert counts["status 2"] > 15 and counts["status 0"] and counts["status 1"]


@pytest.mark.parametrize(
    "done,wrong",
    [
        (Done(None, "", ""), "it does not end"),
        (Done(0, '{"ok": true, "mistakes": []}', ""), "status 0, not [2]"),
        (Done(2, "hello {}", ""), "stdout is not JSON"),
        (Done(2, "", "Traceback"), "no report"),
        (Done(2, '{"ok": false, "error": "TypeError"}', ""), "five parts"),
        (
            Done(2, '{"ok": false, "error": "a\\n  why: b\\n  fix: c\\n  at:  unknown"}', ""),
            "stderr",
        ),
        (Done(2, "{}", "", 300.0), "it takes 300 s"),
    ],
)
def test_the_fuzzer_finds_a_check_that_ends_otherwise(done: Done, wrong: str) -> None:
    assert wrong in verify(Hostile(0, ["check", "x.py:target"], "", frozenset({2})), done)


def test_progress_says_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = command_check.Progress(quiet=True)
    progress(1, 4, Result(Layout(dp=2)))
    progress.end()
    said = capsys.readouterr().err
    assert "1 of 4 layouts, 0 findings, about 0 s left" in said and said.endswith("\x1b[K")
    times = [command_check.duration(seconds) for seconds in (8, 190, 7500)]
    assert times == ["8 s", "3 min", "2 h 5 min"]


# --- Ctrl-C ---------------------------------------------------------------------------------------


def started(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, *words, "check", f"{HOSTILE}:forward_loops", *FEW]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, preexec_fn=_interruptible
    )


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it in background


def ends_cleanly(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    err = "\n".join(line for line in err.splitlines() if not line.startswith("import time"))
    assert process.returncode == 130, err
    assert err == "spmd-moe: interrupted" and out == ""


def test_ctrl_c_ends_a_check_and_what_it_started() -> None:
    process = started("-m", "spmd_moe")
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("looping in"), line
    ends_cleanly(process)
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(line.split()[-1]), 0)


def test_ctrl_c_while_torch_is_imported() -> None:
    process = started("-X", "importtime", "-m", "spmd_moe")
    assert process.stderr is not None
    while "torch" not in process.stderr.readline():
        assert process.poll() is None
    ends_cleanly(process)
