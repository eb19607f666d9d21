"""Programs that write data files of the package. Nothing else imports them.

operator_table    static/ops.json, from spmd_types and the table of moves
"""
