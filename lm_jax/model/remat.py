"""What the backward pass finds of the forward pass, and what it computes again."""

from collections.abc import Callable

import jax

from lm_jax.model.projection import saves_products

_P = jax.checkpoint_policies
_HEADS = "query", "key", "value", "attention"  # names given in `lm_jax.model.block` and kernels
# What the forward pass keeps of each block for the backward pass, from most to least; what it does
# not keep is computed again. 'none': everything. 'all_dots': the outputs of all products, but for
# experts', whose buffers are of the largest size there may be; 'dots': of those without a batch
# axis, which are the projections, and of attention. 'heads': queries, keys and values, and what
# attention makes of them. 'attention': the latter alone. 'full': the block's input alone;
# 'offload' keeps that in the host's memory.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "all_dots": _P.save_from_both_policies(
        saves_products(_P.dots_saveable), _P.save_only_these_names("attention")
    ),
    "dots": _P.save_from_both_policies(
        saves_products(_P.dots_with_no_batch_dims_saveable), _P.save_only_these_names("attention")
    ),
    "heads": _P.save_only_these_names("input", *_HEADS),
    "attention": _P.save_only_these_names("input", "attention"),
    "full": _P.save_only_these_names("input"),
    "offload": _P.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
