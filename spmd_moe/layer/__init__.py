"""The layer. `moe.py` holds its forward, which names the stages in the order of the data.

Read in this order:

    moe_config, router_config                settings
    boundary, check_inputs                   tokens as the caller holds them
    router, router_logits, routing_faults    which experts each token goes to
    permute, copy_rows, dispatch/            rows to the ranks that hold their experts, and back
    experts, grouped_ffn, grouped_matmul, activations
    scaled_rows, combine, shared_experts     rows to tokens again
    balance_losses, selection_bias, expert_load
"""
