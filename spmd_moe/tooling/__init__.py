"""Programs that write data files of the package. Nothing else imports them.

write_ops_json    static/ops.json, from spmd_types and the table of moves
"""
