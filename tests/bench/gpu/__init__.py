"""What only a GPU can show, in one table: `python -m tests.bench.gpu`."""
