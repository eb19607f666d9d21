"""Models and checkpoints of Hugging Face transformers, with our layer in them."""

from spmd_moe.hf.read_checkpoint import load as load
from spmd_moe.hf.swap import swap as swap
from spmd_moe.hf.write_checkpoint import save as save
