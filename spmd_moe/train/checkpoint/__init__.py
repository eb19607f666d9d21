"""Checkpoints: save a training run on one layout, load it on any other, bit for bit.

Read `save_load`, which has the three public functions, then `on_disk`, which documents the
files. `rank_parts` and `random_state` list the tensors that are saved, `optimizer_json` the
optimizer's settings, and `planners` gives torch.distributed.checkpoint their positions. `index`,
`safetensors_file` and `strict_json` are the formats, `check_before_plan` raises before
torch plans, and `convert` changes a checkpoint into torch's own format and back.
"""
