"""The layer beside the MoE layers of transformers and torchtitan: `python -m tests.bench.peers`."""
