"""`python -m spmd_moe` is `spmd-moe`."""

import sys


def main() -> int:
    """The entry point of `spmd-moe`: Ctrl-C is clean even while torch is being imported."""
    try:
        from spmd_moe.check.command_line import main as run

        return run()
    except KeyboardInterrupt:
        print("spmd-moe: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
