"""`spmd-moe convert`: a checkpoint as a folder of torch.distributed.checkpoint, and back."""

from __future__ import annotations

import argparse

from spmd_moe.check.subcommands import Subcommand
from spmd_moe.train.checkpoint.convert import convert

DESCRIPTION = """\
Turn a checkpoint that `save_checkpoint` wrote into a folder of torch.distributed.checkpoint (DCP),
or such a folder into a checkpoint. The files of SOURCE show which of the two it is. One
process does it, with one chunk in memory at a time. Nothing is unpickled except DCP's metadata, of
which only known classes are accepted.
"""

EPILOG = """\
examples:
  spmd-moe convert runs/001/checkpoints/000100 000100.dcp
  spmd-moe convert 000100.dcp 000100

exit status: 0 converted, 2 the source or the target is refused
"""


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint, or a DCP folder")
    parser.add_argument("target", metavar="TARGET", help="the folder to make")


def _convert(args: argparse.Namespace) -> int:
    convert(args.source, args.target)
    return 0


CONVERT = Subcommand(
    "convert", "a checkpoint into a DCP folder, or back", DESCRIPTION, EPILOG, _options, _convert
)
