"""Attention: one function, several backends, all tested against the plain one.

B batch, T query length, S key length, N query heads, K key/value heads, G = N / K, H head width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm_jax.config import ModelConfig
from lm_jax.errors import UserError
from lm_jax.model.dropout import dropout, kept
from lm_jax.model.tiled import MASKED, tiled_attention
from lm_jax.sharding.mesh import activation_spec, platform, reshard, shards


def layer_kinds(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The different windows there are, and for each layer which of them it has."""
    pattern = config.windows or (0,)
    of_layer = [pattern[i % len(pattern)] for i in range(config.layers)]
    windows = tuple(dict.fromkeys(of_layer))
    return windows, tuple(map(windows.index, of_layer))


def attention_mask(
    *,
    causal: bool,
    query_index: jax.Array,
    key_length: int,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    key_prefix: jax.Array | None = None,
    window: int = 0,
) -> jax.Array | None:
    """Which keys a query sees, of its own segment only: earlier ones or itself if `causal`, and
    those of the prefix.

    Args:
      query_index: int32 [B or 1, T], the place of each query among the keys.
      query_segments, key_segments: int32 [B, T] and [B, S]; None: one segment.
      key_prefix: bool [B, S], see `prefix_of`; None: no segment has a prefix.
      window: a causal query sees so many keys, itself included (Beltagy et al. 2020); 0: all.

    Returns:
      bool [B or 1, T, S], True where seen; None where everything is.
    """
    mask_BTS = None
    if causal:
        back_BTS = query_index[:, :, None] - jnp.arange(key_length)[None, None, :]
        mask_BTS = back_BTS >= 0
        if window:
            mask_BTS &= back_BTS < window
        if key_prefix is not None:
            mask_BTS = mask_BTS | key_prefix[:, None, :]
    if query_segments is not None:
        same_BTS = query_segments[:, :, None] == key_segments[:, None, :]
        mask_BTS = same_BTS if mask_BTS is None else mask_BTS & same_BTS
    return mask_BTS


def prefix_of(marked_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Which tokens are of their segment's prefix, bool [B, T]: those marked before the first one
    that is not.

    A mark behind that one does not count: tokens of the prefix would see it, and through it what
    stands between and is to be predicted.

    Args:
      segments_BT: the tokens of a segment stand together. None: one segment.
    """
    places_BT = jnp.broadcast_to(jnp.arange(marked_BT.shape[1])[None], marked_BT.shape)
    begins_BT = jnp.zeros_like(places_BT)
    if segments_BT is not None:
        changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
        changes_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)))
        begins_BT = jax.lax.cummax(jnp.where(changes_BT, places_BT, 0), axis=1)
    unmarked_BT = jax.lax.cummax(jnp.where(marked_BT, -1, places_BT), axis=1)
    return unmarked_BT < begins_BT


def resolve_backend(config: ModelConfig, length: int) -> str:
    """The backend for rows of `length` tokens: what 'auto' stands for, or what was asked for.

    Raises:
      UserError: it was asked for, and cannot be had for this model, mesh or platform.
    """
    width, parts, here = config.head_width, shards("length"), platform()
    if config.prefix_attention and parts > 1:
        raise UserError(f"mesh.sequence: must be 1 with model.prefix_attention, not {parts}")
    if config.attention == "xla":
        return "xla"
    no_dropout = "model.dropout = 0", config.dropout > 0
    no_prefix = "model.prefix_attention = False", config.prefix_attention
    obstacles = {
        "splash": (
            no_prefix,
            (f"a TPU, and this is {here}", here != "tpu"),
            no_dropout,
            (f"a part of a row of a multiple of 128 tokens, not {length}", length % (128 * parts)),
        ),
        "cudnn": (
            no_prefix,
            (f"an NVIDIA GPU, and this is {here}", here != "gpu"),
            ("model.dtype = bfloat16", config.dtype != "bfloat16"),
            no_dropout,
            (
                f"a model.head_width of up to 128 that 8 divides, not {width}",
                width > 128 or width % 8,
            ),
            ("model.attention_softcap = 0", config.attention_softcap > 0),
            (f"an even number of tokens a row, not {length}", length % 2),
        ),
        "ring": (
            no_prefix,
            ("mesh.sequence above 1, that divides the row", parts == 1 or length % parts),
            no_dropout,
        ),
        "tiled": (
            (f"a CPU, and this is {here}", here != "cpu"),
            (f"mesh.sequence = 1, not {parts}", parts > 1),
            ("model.attention_softcap = 0", config.attention_softcap > 0),
        ),
    }
    if config.attention == "auto":
        usable = (k for k, needs in obstacles.items() if not any(missing for _, missing in needs))
        return next(usable, "xla")
    needed = [need for need, missing in obstacles[config.attention] if missing]
    if needed:
        raise UserError(f"model.attention: '{config.attention}' needs {needed[0]}; use auto")
    return config.attention


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    *,
    backend: str = "xla",
    causal: bool = False,
    length: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017), grouped where K < N.

    Grouped queries are from Ainslie et al. 2023. Scores and softmax are float32, whatever the
    inputs are.

    Args:
      mask_BTS: see `attention_mask`.
      backend: 'xla' (the reference), 'cudnn' or 'tiled'.
      causal: the mask hides all keys behind a query, with which 'tiled' saves half of the work.
      length: logical axis of T. Where the mesh splits it, each part of the queries sees the keys
        and values of all, gathered.
      scale: of the scores; None: H ** -0.5.
      softcap: scores are squashed into (-softcap, softcap) by tanh (Gemma 2); 0: not. With 'xla'
        alone.
      dropout_rate: on the attention weights; needs `dropout_key`. Not with 'cudnn'.

    Returns:
      [B, T, N, H], of the dtype of `q_BTNH`.
    """
    gathered = activation_spec("batch", None, "kv_heads", "head_width")
    k_BSKH, v_BSKH = reshard(k_BSKH, gathered), reshard(v_BSKH, gathered)
    if backend == "cudnn":
        out_BTNH = _cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, length)
        return checkpoint_name(out_BTNH, "attention")
    if backend == "tiled":
        kept_BKGTS = None
        if dropout_key is not None and dropout_rate:
            (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
            spec = activation_spec("batch", "kv_heads", None, length, None)
            kept_BKGTS = kept((B, K, N // K, T, S), dropout_rate, dropout_key, spec)
        run = functools.partial(
            tiled_attention,
            causal=causal,
            scale=q_BTNH.shape[3] ** -0.5 if scale is None else scale,
            rate=dropout_rate,
        )
        return _on_each_device(run, q_BTNH, k_BSKH, v_BSKH, mask_BTS, kept_BKGTS, length=length)
    weights_BKGTS = attention_weights(
        q_BTNH, k_BSKH, mask_BTS, length=length, scale=scale, softcap=softcap
    )
    weights_BKGTS = dropout(weights_BKGTS, dropout_rate, dropout_key)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    merged = activation_spec("batch", length, "heads", "head_width")
    out_BTNH = jax.lax.reshape(out_BTKGH, q_BTNH.shape, out_sharding=merged)
    return checkpoint_name(out_BTNH, "attention")


def attention_weights(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    *,
    length: str | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """How much of each key's value a query takes: float32 [B, K, G, T, S], whose sums over S are 1.

    The arguments are those of `attention`, the keys whole; query head n is (n // G, n % G) here.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    grouped = activation_spec("batch", length, "kv_heads", None, "head_width")
    q_BTKGH = jax.lax.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=grouped)
    scores_BKGTS = (H**-0.5 if scale is None else scale) * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    mask = None if mask_BTS is None else mask_BTS[:, None, None]
    return _softmax(scores_BKGTS, mask, softcap)


def step_attention(
    q_B1NH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_B1S: jax.Array | None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
) -> jax.Array:
    """`attention` of one query a row to keys and values as a cache has them: [B, 1, N, H].

    XLA's CPU backend transposes all of them for the same products written with the other order of
    axes.
    """
    (B, _, N, H), K = q_B1NH.shape, k_BKSH.shape[1]
    grouped = activation_spec("batch", "kv_heads", None, "head_width")
    q_BKGH = jax.lax.reshape(q_B1NH, (B, K, N // K, H), out_sharding=grouped)
    scores_BKGS = (H**-0.5 if scale is None else scale) * jnp.einsum(
        "BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    mask = None if mask_B1S is None else mask_B1S[:, None]
    weights_BKGS = _softmax(scores_BKGS, mask, softcap).astype(v_BKSH.dtype)
    out_BKGH = jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, v_BKSH)
    merged = activation_spec("batch", None, "heads", "head_width")
    return jax.lax.reshape(out_BKGH, (B, 1, N, H), out_sharding=merged)


def _softmax(scores: jax.Array, mask: jax.Array | None, softcap: float) -> jax.Array:
    """Over the last axis, of what the mask lets through."""
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    return jax.nn.softmax(scores, axis=-1)


def _cudnn(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    scale: float | None,
    length: str | None,
) -> jax.Array:
    """Each device runs the kernel on its own rows and heads.

    Left to jax, the kernel's result says that it is whole on every device, whatever the inputs are,
    and the gradient of what follows cannot be traced on an Explicit mesh.
    """

    def local(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
        mask = None if mask_BTS is None else mask_BTS[:, None]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask, scale=scale, implementation="cudnn"
        )

    return _on_each_device(local, q_BTNH, k_BSKH, v_BSKH, mask_BTS, length=length)


def _on_each_device(
    local: Callable[..., jax.Array], *inputs: jax.Array | None, length: str | None
) -> jax.Array:
    """`local` of each device's parts of queries, keys, values and what there is besides: [B, T, N,
    H], as the queries are."""
    q_spec = activation_spec("batch", length, "heads", "head_width")
    if q_spec is not None:
        kv_spec = activation_spec("batch", None, "kv_heads", "head_width")
        rest = (None if x is None else jax.typeof(x).sharding.spec for x in inputs[3:])
        in_specs = q_spec, kv_spec, kv_spec, *rest
        local = jax.shard_map(local, in_specs=in_specs, out_specs=q_spec, check_vma=False)
    return local(*inputs)
