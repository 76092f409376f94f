"""Sums know arrays again whatever their layout, and by nothing but what is in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm_jax.training.checksums import checksums

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool")


def sum_of(x):
    return checksums({"x": jnp.asarray(x)})[0]["x"]


def some(dtype, shape=(4, 6, 8)):
    drawn = np.random.default_rng(0).integers(-99, 99, shape)
    return jnp.asarray(drawn % 2 if dtype == "bool" else drawn).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_has_the_same_sum_on_any_mesh(dtype):
    x = some(dtype)
    found = {sum_of(x)}
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        for spec in (P(), P("a"), P("b", "a"), P(None, None, "b"), P(("a", "b"))):
            if all(n % (mesh.shape[a] if isinstance(a, str) else 8) == 0
                   for n, a in zip(x.shape, spec) if a):  # fmt: skip
                found.add(sum_of(jax.device_put(x, NamedSharding(mesh, spec))))
    assert len(found) == 1 and len(found.pop()) == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bit_of_each_element_counts(dtype):
    x = np.asarray(some(dtype, (3, 5)))
    seen = {sum_of(x)}
    bits = x.view(f"uint{8 * x.itemsize}")
    for i in range(x.size):
        for bit in range(1 if dtype == "bool" else 8 * x.itemsize):
            changed = bits.copy()
            changed.reshape(-1)[i] ^= 1 << bit
            seen.add(sum_of(changed.view(x.dtype)))
    assert len(seen) == 1 + x.size * (1 if dtype == "bool" else 8 * x.itemsize)


def test_sums_stay_what_they_are():
    """Others would make damage of all checkpoints that there are."""
    known = ("173cb9cc7b62de2e", "323cb2c378c80a66", "bcdee3dd37abe464", "f8c79361eb370c72")
    assert tuple(sum_of(some(dtype)) for dtype in DTYPES) == (*known, "54864a8fd077d4cb")
    assert sum_of(jnp.float32(3.0)) == "7c83dbb1ee3b1589"


def test_places_count():
    x = np.asarray(some("float32", (4, 4)))
    others = (x.T, x[::-1], np.roll(x, 1), np.zeros_like(x), x[:, ::-1])
    assert len({sum_of(y) for y in (x, *others)}) == 6


def test_two_changes_do_not_cancel():
    """Of the same bits in two places, whichever they are."""
    x = np.zeros(64, np.uint32)
    seen = {sum_of(x)}
    for bit in (0, 15, 31):
        for i in range(1, 64):
            y = x.copy()
            y[[0, i]] ^= np.uint32(1 << bit)
            seen.add(sum_of(y))
    assert len(seen) == 1 + 3 * 63


def test_what_is_no_number_is_named():
    fine, strange = jnp.ones(3), jnp.array([1.0, jnp.nan])
    arrays = {"a": fine, "b": strange, "c": -fine / 0, "d": jnp.arange(3)}
    assert checksums(arrays)[1] == ["b", "c"]
    assert checksums({}) == ({}, [])


def test_wider_elements_are_refused():
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
        checksums({"x": jnp.ones(2, jnp.float64)})
