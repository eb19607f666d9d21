"""Checkpoints: save a training run on one layout, load it on any other, bit for bit.

Read `save_load`, which has the three public functions, then `on_disk`, which says what lies on
disk. `rank_parts` and `random_state` list the tensors that are saved, `optimizer_json` what is
saved beside them, and `planners` tells torch.distributed.checkpoint where they are. `index`,
`safetensors_file` and `strict_json` are the formats, `check_before_plan` what is refused before
torch plans, and `convert` changes a checkpoint into torch's own format and back.
"""
