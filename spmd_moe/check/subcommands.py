"""Subcommands of `spmd-moe`: what each one declares, and the option types that they share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from spmd_moe.check.layouts import Layout

LARGEST_WORLD = 2**20  # ranks; a mesh of more is a typing error
LARGEST_NUMBER = 2**31 - 1


@final
@dataclass(frozen=True, slots=True)
class Subcommand:
    """One subcommand: a new one is one file with a `Subcommand`, and one entry in `SUBCOMMANDS`."""

    name: str
    summary: str  # its line in `spmd-moe --help`
    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # returns the exit status


def number(least: int, most: int = LARGEST_NUMBER) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""

    def convert(text: str) -> int:
        # Not int() first: it refuses more than 4,300 digits with a text of its own.
        if not re.fullmatch(r"[+-]?[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{shown(text)} is not a whole number from {least} to {most}"
            )
        return int(text)

    return convert


def seconds(text: str) -> float:
    """The type of an option that is a time limit."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of seconds above 0")
    return value


def layout(text: str) -> Layout:
    """The type of an option that is a layout: `dp 2 tp 4 ep 8` or `dp=2,tp=4,ep=8`."""
    found = re.findall(r"([a-z]+)[ =]+([0-9]+)", text)
    names = [name for name, _ in found]
    rest = re.sub(r"([a-z]+)[ =]+([0-9]+)", "", text).strip(" ,")
    if rest or not found or not set(names) <= {"dp", "cp", "tp", "ep", "etp"}:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not like 'dp 2 tp 4 ep 8'")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise argparse.ArgumentTypeError(f"{shown(text)}: {twice} is given twice")
    if any(len(size) > 7 for _, size in found):
        raise argparse.ArgumentTypeError(f"{shown(text)}: at most {LARGEST_WORLD} ranks")
    degrees = {name: int(size) for name, size in found}
    if min(degrees.values()) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)}: a degree is at least 1")
    made = Layout(**degrees)
    if max(made.world, made.ep * made.etp) > LARGEST_WORLD:
        raise argparse.ArgumentTypeError(f"{shown(text)}: at most {LARGEST_WORLD} ranks")
    if made.world % (made.ep * made.etp):
        share = f"ep {made.ep} x etp {made.etp} does not divide {made.world} ranks"
        raise argparse.ArgumentTypeError(f"{shown(text)}: {share}")
    return made


def shown(text: str) -> str:
    """A word of the command line in quotes, short and in ASCII."""
    return ascii(text if len(text) <= 60 else text[:57] + "...")
