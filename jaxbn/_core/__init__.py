"""Batch normalization as pure functions of arrays, from the whole to its parts.

    batch_norm         `bn_apply`: moments, normalization, update
    batch_moments      count, mean and variance of a batch, about a pivot
    normalize_batch    normalization by the batch, and its derivative
    normalize          normalization by given statistics; padding
    update_state       the running statistics and the count of updates
    state              parameters and state; their initialization
    moments            `Moments`, and exact pooling of groups
    pool_updates       one update from several microbatches
    momentum           a fraction, or a schedule of the count of updates
    reduction          the axes and devices that share statistics: `axis_name`
    ghost              ghost batches
    renorm             batch renormalization
    epilogue           scale and bias by example, residual, activation
    complex_pairs      complex input
    save_inputs        a rematerialization policy
    linear_map         a primitive: a linear map with its transpose
    fusion_barrier     what XLA for CPUs must not fuse or share
    layout             per-feature arrays against x; their sharding
    fetch              arrays of several processes as NumPy arrays
    check              checks of arguments

`jaxbn.linen` and `jaxbn.nnx` keep the arrays of these functions in variables.
"""
