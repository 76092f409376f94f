"""Splash attention: jax's Pallas kernel for TPUs, which never holds the scores of a whole row.

Flash attention (Dao et al. 2022) that skips blocks of keys that no query of a block sees: half of
them under a causal mask, nearly all of them under a narrow window.

B batch, T query length, S key length, N query heads, K key/value heads, H head width.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.sharding.mesh import activation_spec, reshard, shards

LANES = 128  # a block is a multiple of so many queries or keys
# The most of each in a block. Larger ones move fewer keys, and more of what lies in them is masked.
_QUERIES, _KEYS = 512, 1024


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    causal: bool,
    window: int = 0,
    length: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """As `lm_jax.model.attention.attention`, on a TPU and without dropout.

    Each device runs the kernel on its own rows and heads. Where the mesh splits rows, it does so
    for its own queries, and the keys and values of the whole row are gathered.

    Args:
      segments_BT: int32 document ids of a row's tokens, which are queries and keys alike; None: one
        document.
      window: of a causal model: see `attention_mask`; 0: all.
      length: logical axis of T.
      interpret: runs the kernel's program step by step on any device, to test it.

    Returns:
      [B, T, N, H], of the dtype of `q_BTNH`.
    """
    _, T, N, H = q_BTNH.shape
    whole = activation_spec("batch", None, "kv_heads", "head_width")
    k_BSKH, v_BSKH = reshard(k_BSKH, whole), reshard(v_BSKH, whole)
    segments_BS = segments_BT
    if segments_BT is not None:
        segments_BT = reshard(segments_BT, activation_spec("batch", length))
        segments_BS = reshard(segments_BT, activation_spec("batch", None))
    SegmentIds = _pallas().SegmentIds
    kernel = _kernel(N // shards("heads"), T, shards(length), causal, window, softcap, interpret)
    factor = H**-0.5 if scale is None else scale
    q_BTNH = (q_BTNH.astype(jnp.float32) * factor).astype(q_BTNH.dtype)

    def local(kernel, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS):
        def row(q_TNH, k_SKH, v_SKH, segments_T, segments_S):
            segments = None if segments_T is None else SegmentIds(segments_T, segments_S)
            y_NTH = kernel(
                jnp.moveaxis(q_TNH, 1, 0),
                jnp.moveaxis(k_SKH, 1, 0),
                jnp.moveaxis(v_SKH, 1, 0),
                segment_ids=segments,
            )
            return jnp.moveaxis(y_NTH, 0, 1)

        return jax.vmap(row)(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)

    inputs = q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # The kernel's list of blocks to visit; without a mask, it is the same for all queries.
        rows = activation_spec(length if causal else None)
        spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, *rows)))
        kernel = jax.tree.map(reshard, kernel, spec)
        spec_of = lambda x: None if x is None else jax.typeof(x).sharding.spec  # noqa: E731
        local = jax.shard_map(
            local,
            in_specs=(spec, *map(spec_of, inputs)),
            out_specs=activation_spec("batch", length, "heads", "head_width"),
            check_vma=False,
        )
    return local(kernel, *inputs)


def _pallas():
    """jax's module: it takes a third of a second to import, which is for those who use it."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def _kernel(heads: int, T: int, parts: int, causal: bool, window: int, softcap: float, interpret):
    jax_splash = _pallas()
    if window:
        mask = jax_splash.LocalMask((T, T), (window - 1, 0), 0, shard_count=parts)
    elif causal:
        mask = jax_splash.CausalMask((T, T), shard_count=parts)
    else:
        mask = jax_splash.FullMask((T // parts, T))
    queries, keys = _block(T // parts, _QUERIES), _block(T, _KEYS)
    return jax_splash.make_splash_mha(
        jax_splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=parts if causal else 1,
        block_sizes=jax_splash.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=_block(keys, _QUERIES),
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=_block(keys, _QUERIES),
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _block(length: int, most: int) -> int:
    """The largest multiple of `LANES` up to `most` that divides `length`."""
    return max(n for n in range(LANES, most + 1, LANES) if length % n == 0)
