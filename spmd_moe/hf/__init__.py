"""Models and checkpoints of Hugging Face transformers, with our layer in them.

Read in this order:

    family, families*                          one record for each family; what records share
    find_blocks, block, swap                   every MoE block replaced by the layer
    names_on_disk, element_map, checkpoint_layout   where each parameter lies in their files
    safetensors_slices, read_checkpoint, write_checkpoint
    pooled_loss, model_methods                 their loss over ranks, their own `save_pretrained`
"""

from spmd_moe.hf.read_checkpoint import load as load
from spmd_moe.hf.swap import swap as swap
from spmd_moe.hf.write_checkpoint import save as save
