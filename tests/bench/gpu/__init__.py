"""Checks that need a GPU, in one table: `python -m tests.bench.gpu`."""
