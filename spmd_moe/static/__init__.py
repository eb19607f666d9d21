"""Placements in mypy: the plugin's engine. Nothing here imports torch.

Read in this order:

    kinds, operator_rules, collective_calls     what operators and collectives do to kinds
    placed_types, annotations, role_names      kinds inside mypy's types
    expression_hooks, module_calls, hook_table  what mypy asks while it checks an expression
    review_module and what it calls             what is reported when a module is done
    plugin_entry, daemon, end_of_module         the plugin as mypy sees it; dmypy

`messages` and `error_report` word what is found. `ops.json` is generated from spmd_types.
"""
