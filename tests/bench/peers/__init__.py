"""The layer compared with transformers and torchtitan: `python -m tests.bench.peers`."""
