"""Sums by which what a checkpoint holds is known again, however it is laid out over devices.

An array's sum is that of its elements' hashes modulo 2^64 (two words of 32 bits), where the hash of
an element mixes its bits with its place in the array. Integers add up to the same in any order, so
that each device sums up its own part, and an array that was saved from one mesh has the same sum on
any other. Whatever changes a single element changes the sum; of other changes, made without regard
to these hashes, one in about 2^64 goes unnoticed.

What was saved has these sums: with others, all checkpoints there are would be damaged.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_OF_AXIS = 0x9E3779B9  # times the axis' number, so that each hashes its indices otherwise
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def checksums(arrays: Mapping[Any, jax.Array]) -> tuple[dict[Any, str], list[Any]]:
    """The sum of each array, in 16 hexadecimal digits, and the names of those that have elements
    which are no numbers (nan or infinite).

    All processes of a job call it together, with arrays of the same names.

    Raises:
      ValueError: an element has more than four bytes.
    """
    # A program for each shape: the moments of an optimizer have those of the parameters. One after
    # the other: simulated devices can wait for each other for ever in several at a time.
    words = {name: jax.device_get(_sums(x)) for name, x in arrays.items()}
    sums = {name: f"{first:08x}{second:08x}" for name, (first, second, _) in words.items()}
    return sums, [name for name, (_, _, strange) in words.items() if strange]


def item_sums(items: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """As `checksums`, of trees of arrays: for each item the sums by the paths in its tree."""
    flat = {
        (item, jax.tree_util.keystr(path)): x
        for item, tree in items.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    sums, strange = checksums(flat)
    by_item: dict[str, dict[str, str]] = {item: {} for item in items}
    for (item, path), found in sums.items():
        by_item[item][path] = found
    return by_item, ["".join(key) for key in strange]


def json_sum(data: Any) -> str:
    """SHA-256 of what is written of `data` as JSON, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differing(found: Mapping[str, Mapping[str, str]], data: Any, known: Any) -> str:
    """What has another sum than it had when it was saved, or ''.

    Args:
      found: the sums of items, as `item_sums` gives them.
      data: what is to have the sum 'data' among the known; None: it was not read.
      known: the sums when they were saved, perhaps of more items, if they can be made out; None:
        there are none, as of a checkpoint that is older than they are.
    """
    if known is None:
        return "the item 'sums', which is missing," if data and "lanes" in data else ""
    if not (isinstance(known, dict) and all(isinstance(known.get(i), dict) for i in found)):
        return "the item 'sums'"
    if data is not None and known.get("data") != json_sum(data):
        return "the place in the data"
    for item, sums in found.items():
        for path in sorted(sums.keys() | known[item].keys()):
            if sums.get(path) != known[item].get(path):
                return f"{item}{path}"
    return ""


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """uint32 [3]: the words of an array's sum, and how many of its elements are no numbers."""
    if jax.sharding.get_abstract_mesh().empty:
        return _sum(x)
    return jax.sharding.auto_axes(_sum, out_sharding=jax.sharding.PartitionSpec())(x)


def _sum(x: jax.Array) -> jax.Array:
    if x.dtype.itemsize not in _UNSIGNED:
        raise ValueError(f"{x.dtype}: elements of at most four bytes have a sum")
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    # Not the place in a row of all elements: modulo 2^32 those of two layers may be the same.
    place = jnp.zeros_like(bits)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        if axis < x.ndim - 1:
            along = _scattered(along + np.uint32(_OF_AXIS * (axis + 1) % 2**32))
        place += along
    strange = jnp.zeros_like(bits)
    if jnp.issubdtype(x.dtype, jnp.floating):
        strange = (~jnp.isfinite(x)).astype(jnp.uint32)
    # For each place another bijection of the bits; and of these another one.
    first = _scattered(bits + place * np.uint32(0x9E3779B1))
    terms = first, _scattered(first ^ np.uint32(0x7F4A7C15)), strange
    # One reduction of the three: of three, each would write its terms to memory first, on a CPU
    # eight times slower and with two arrays more of the size of `x`.
    zeros = (np.uint32(0),) * len(terms)
    sums = jax.lax.reduce(terms, zeros, _added, tuple(range(x.ndim)))
    return jnp.stack(sums)


def _added(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _scattered(word: jax.Array) -> jax.Array:
    """A bijection in which each bit depends on all (MurmurHash3's finalizer, Appleby 2011)."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
