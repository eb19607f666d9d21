"""The vocabulary and the moves, on which everything else is built.

Read in this order:

    errors, placement, declare_placements   exceptions; kinds, roles and `Placed`
    shard_shape, mesh                       rows per rank; the ranks as two meshes
    moves, collectives, redistribute        the table of moves, and how a tensor takes one

The rest are small helpers: `validate` (settings), `mesh_degrees`, `bind_roles` (to a mesh that
exists), `check_gpu`, `ranks_agree` (settings that differ between ranks), `compute_dtype`,
`host_values`, `torch_modes` (is torch tracing?) and `per_rank_work` (many ranks simulated in one
process).
"""
