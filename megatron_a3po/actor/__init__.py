"""The Megatron-Core side: the target policy on a tensor x pipeline x data grid.

Read in this order:

    grid        which rank stands where; the only file that touches Megatron-Core's parallel_state
    model       the target policy, from Megatron-Core's parts, returning hidden states
    layers      what Megatron-Core lacks without Transformer Engine
    packing     sequences to packed micro-batches
    pipeline    Megatron-Core's schedule with the loss layer as its loss function
    optimizer   Megatron-Core's optimizer, and the update that is applied on all ranks or on none
    actor       all of it together
    checkpoint  distributed checkpoints
    cpu         Megatron-Core without a GPU
"""
