"""Checks that run without GPUs, in one process: see `spmd-moe check --help`."""
