"""`python -m spmd_moe` is `spmd-moe`."""

import sys

from spmd_moe.check.command_line import main

if __name__ == "__main__":
    sys.exit(main())
