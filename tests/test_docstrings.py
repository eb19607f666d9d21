"""Docstrings of public names: one sentence, the parts of the API reference, examples that run."""

from __future__ import annotations

import doctest
import inspect
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import pytest

import spmd_moe
from tests.support.simulated_ranks import leave_world

NAMES: list[str] = vars(spmd_moe)["__all__"]
# Objects and aliases have no docstring of their own; docs/api describes them.
PLAIN = {
    name
    for name in NAMES
    if not inspect.isroutine(getattr(spmd_moe, name))
    and not inspect.isclass(getattr(spmd_moe, name))
}
DESCRIBED = sorted(set(NAMES) - PLAIN - {"S"})  # S is a class of spmd_types
NEVER_RAISE = {"clamped_swiglu", "latest_checkpoint"}
PARTS = re.compile(r"^(Args|Attributes|Returns|Raises|Example):$", re.M)


def doc_of(name: str) -> str:
    return inspect.getdoc(getattr(spmd_moe, name)) or ""


def needed(value: Any) -> set[str]:
    """The parts that a docstring must have."""
    if inspect.isclass(value):
        is_error, is_choice = issubclass(value, Exception), issubclass(value, Enum)
        is_protocol = getattr(value, "_is_protocol", False)
        if is_dataclass(value):
            has_fields = bool(fields(value))
        else:
            has_fields = "__init__" in vars(value) and not (is_error or is_choice or is_protocol)
        return {"Example"} | ({"Args or Attributes"} if has_fields else set())
    signature = inspect.signature(value)
    parts = {"Example"} | (set() if value.__name__ in NEVER_RAISE else {"Raises"})
    parts |= {"Args"} if signature.parameters else set()
    returns = str(signature.return_annotation)
    return parts | (set() if returns in ("None", "'None'") else {"Returns"})


def missing(name: str) -> list[str]:
    text = doc_of(name)
    found = set(PARTS.findall(text))
    if found & {"Args", "Attributes"}:
        found.add("Args or Attributes")
    wanted = needed(getattr(spmd_moe, name))
    if name == "MoEMesh":
        wanted -= {"Args or Attributes"}  # built by its class methods
    first = text.split("\n\n")[0]
    wrong = [] if first.endswith(".") and len(first.splitlines()) == 1 else ["one sentence"]
    return wrong + sorted(wanted - found)


@pytest.mark.parametrize("name", DESCRIBED)
def test_every_public_name_has_the_parts_of_the_reference(name: str) -> None:
    assert missing(name) == []


@pytest.mark.parametrize("name", DESCRIBED)
def test_every_argument_is_described(name: str) -> None:
    value: Any = getattr(spmd_moe, name)
    text = doc_of(name)
    if not inspect.isroutine(value) and not (is_dataclass(value) and "Args:" in text):
        return
    section = re.findall(r"^(?:Args|Attributes):\n((?:    .*\n|\n)+)", text + "\n", re.M)[0]
    described = re.findall(r"^    (\w+): ", section, re.M)
    own = [p for p in inspect.signature(getattr(spmd_moe, name)).parameters if p != "self"]
    assert described == own


@pytest.mark.parametrize("name", DESCRIBED)
def test_its_example_runs(name: str) -> None:
    parsed = doctest.DocTestParser().get_doctest(doc_of(name), {}, name, None, 0)
    assert parsed.examples
    said: list[str] = []
    try:
        failed, tried = doctest.DocTestRunner(verbose=False).run(parsed, out=said.append)
    finally:
        leave_world()
    assert tried and not failed, "".join(said)


def test_plain_names_are_described_in_the_reference() -> None:
    assert {"R", "I", "V", "P", "DP", "EP", "SWIGLU", "Kind"} <= PLAIN
    assert len(PLAIN) + len(DESCRIBED) + 1 == len(NAMES)
