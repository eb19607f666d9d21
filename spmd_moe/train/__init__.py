"""Whole models on a mesh: what one training step and one training run need outside of the layer.

Read `obligations` first: from the declared placements it derives over which ranks the gradient of
each parameter is summed, and which part of it is counted in a norm. The rest follows from that
table: `init_weights`, `gradients` (reduce and clip) with `reduced_gradients`, `parallelize` (FSDP2)
with `storage_mesh`, and `checkpoint/`. `recompute` is activation checkpointing.
"""
